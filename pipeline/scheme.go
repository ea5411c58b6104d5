package pipeline

import (
	"slices"

	"github.com/lorakit/lorakit/quant"
)

// leaves reports whether weights leave the scheme that they are in, so that the result's config.json has another or
// none. All do then.
func (b *planner) leaves() bool {
	return b.from.gguf != nil && !b.from.gguf.own || b.Quantize == "none" || len(b.dissolved) > 0 ||
		b.scheme != nil && b.changed
}

// withoutCalibration leaves out what has a meaning only beside weights in the scheme that they were in.
func (b *planner) withoutCalibration(jobs []Job) []Job {
	calibration := map[string]bool{}
	for _, w := range b.from.Weights {
		if w.Calibration {
			calibration[w.Name] = true
		}
	}
	if len(calibration) == 0 || !b.leaves() {
		return jobs
	}
	var left []string
	jobs = slices.DeleteFunc(jobs, func(j Job) bool {
		if calibration[j.Weight] {
			left = append(left, j.Weight)
		}
		return calibration[j.Weight]
	})
	b.p.Notices = append(b.p.Notices, leftOut(left))
	return jobs
}

// leftOut is the notice of tensors that go with the scheme.
func leftOut(names []string) string {
	return "not written, since it is no part of the model but of the scheme that its weights were in: " + list(names, 3)
}

// withoutConfigFiles leaves out the files of a folder that would contradict the result, as its config.json does not.
func (b *planner) withoutConfigFiles(files []InputFile) []InputFile {
	if !b.leaves() {
		return files
	}
	var names, left []string
	for _, s := range b.Schemes.All() {
		if a, ok := s.(quant.Accompanied); ok {
			names = append(names, a.ConfigFiles()...)
		}
	}
	files = slices.DeleteFunc(files, func(f InputFile) bool {
		of := slices.Contains(names, f.Name)
		if of {
			left = append(left, f.Name)
		}
		return of
	})
	if len(left) > 0 {
		b.notice("not carried along, since it tells how the weights were quantised: %s", list(left, 4))
	}
	return files
}
