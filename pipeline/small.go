package pipeline

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// maxClaimedBytes bounds a file that a format takes into its own: a tokenizer has some ten megabytes.
const maxClaimedBytes = 256 << 20

// smallFiles are what a checkpoint has beside its weights, as the result gets it.
type smallFiles struct {
	made    []formats.File // config.json, and what the source's format has in its own files
	copied  []InputFile    // copied as they are
	skipped []string
	claimed []formats.File // what becomes a part of the weights' files
}

// smallFiles decides what becomes of the files beside the weights. What the format that is written claims is read, from
// the source's folder too.
func (b *planner) smallFiles(ctx context.Context) (*smallFiles, error) {
	read := b.Files()
	if b.QuantizationFile != "" {
		read = append(slices.Clip(read), b.QuantizationFile)
	}
	for _, name := range read {
		in, err := inputFileIn(ctx, b.Dir, name)
		if err != nil {
			return nil, err
		}
		b.p.Inputs = append(b.p.Inputs, in)
	}
	s := &smallFiles{}
	if g := b.from.gguf; g != nil && !g.own {
		return s, b.besideGGUF(ctx, s)
	}
	claimer, claims := b.format.(formats.Claimer)
	if b.p.SingleFile && !claims { // nothing stands beside it
		return s, nil
	}
	there := map[string]bool{}
	if b.Config != nil {
		if b.ConfigVersion != "" {
			config := InputFile{checkpoint.ConfigName, int64(len(b.ConfigJSON)), b.ConfigVersion}
			b.p.Inputs = append(b.p.Inputs, config)
		}
		config, err := b.editedConfig()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(b.Path, checkpoint.ConfigName), err)
		}
		s.made = append(s.made, formats.File{Name: checkpoint.ConfigName, Data: config})
		there[checkpoint.ConfigName] = true
	}
	if b.Folder {
		for _, name := range b.Files() {
			there[name] = true
		}
		var err error
		if s.copied, s.skipped, err = filesToCopy(ctx, b.Dir, b.Formats, there); err != nil {
			return nil, err
		}
		s.copied = b.withoutConfigFiles(s.copied)
		for _, f := range s.copied {
			there[f.Name] = true
		}
	}
	for _, f := range b.InnerFiles() { // a file beside the weights comes before one within
		if !there[f.Name] {
			s.made = append(s.made, f)
		}
	}
	if claims {
		if err := b.claim(ctx, claimer, s); err != nil {
			return nil, fmt.Errorf("%s: %w", b.Path, err)
		}
	}
	return s, nil
}

// besideGGUF decides what stands beside a GGUF file that is made of a model: what is neither its config nor its
// tokenizer, which the file's keys have.
func (b *planner) besideGGUF(ctx context.Context, s *smallFiles) error {
	if b.ConfigVersion != "" {
		b.p.Inputs = append(b.p.Inputs, InputFile{checkpoint.ConfigName, int64(len(b.ConfigJSON)), b.ConfigVersion})
	}
	b.p.Inputs = append(b.p.Inputs, b.from.gguf.consumed...)
	if b.p.SingleFile || !b.Folder {
		return nil
	}
	consumed := map[string]bool{checkpoint.ConfigName: true, generationConfig: true, b.QuantizationFile: true}
	for _, in := range b.from.gguf.consumed {
		consumed[in.Name] = true
	}
	for _, name := range b.Files() {
		consumed[name] = true
	}
	var err error
	s.copied, s.skipped, err = filesToCopy(ctx, b.Dir, b.Formats, consumed)
	s.copied = b.withoutConfigFiles(s.copied)
	return err
}

// generationConfig is about a model as transformers runs it.
const generationConfig = "generation_config.json"

// claim gives the format what it has a place for.
func (b *planner) claim(ctx context.Context, c formats.Claimer, s *smallFiles) error {
	var names []string
	for _, f := range s.made {
		names = append(names, f.Name)
	}
	for _, f := range s.copied {
		names = append(names, f.Name)
	}
	chosen, err := c.Claim(ctx, names)
	if err != nil {
		return err
	}
	s.made = slices.DeleteFunc(s.made, func(f formats.File) bool {
		claimed := slices.Contains(chosen, f.Name)
		if claimed {
			s.claimed = append(s.claimed, f)
		}
		return claimed
	})
	var rest []InputFile
	for _, in := range s.copied {
		if !slices.Contains(chosen, in.Name) {
			rest = append(rest, in)
			continue
		}
		data, err := checkpoint.ReadSmall(ctx, b.Dir, in.Name, maxClaimedBytes)
		if err != nil {
			return err
		}
		b.p.Inputs = append(b.p.Inputs, in)
		s.claimed = append(s.claimed, formats.File{Name: in.Name, Data: data})
	}
	s.copied = rest
	return nil
}

// putBeside puts the small files beside the weights, but for those that the format has written anew. One whose weights
// would take the place of such a file, or that has a config.json of its own, is refused; some file systems do not tell
// the case of letters either.
func (b *planner) putBeside(s *smallFiles) error {
	if b.p.SingleFile {
		return nil
	}
	written, shards, extra := map[string]bool{}, map[string]string{}, map[string]string{}
	for _, f := range b.p.Files {
		written[f.Name] = true
		extra[strings.ToLower(f.Name)] = f.Name
	}
	for _, sh := range b.p.Shards {
		written[sh.Name] = true
		shards[strings.ToLower(sh.Name)] = sh.Name
	}
	for _, f := range s.made {
		folded := strings.ToLower(f.Name)
		if taken := cmp.Or(shards[folded], extra[folded]); taken != "" {
			return b.inThePlaceOf(taken, f.Name)
		}
	}
	for _, f := range s.copied {
		if taken := shards[strings.ToLower(f.Name)]; taken != "" {
			return b.inThePlaceOf(taken, f.Name)
		}
	}
	b.p.Files = append(b.p.Files, s.made...)
	b.p.Copied = slices.DeleteFunc(s.copied, func(f InputFile) bool { return written[f.Name] })
	skipped := slices.DeleteFunc(s.skipped, func(name string) bool { return written[name] })
	if len(skipped) > 0 {
		b.notice("not carried along: %s", list(skipped, 4))
	}
	return nil
}

// inThePlaceOf is the error of a format whose file has the name of another file of the checkpoint.
func (b *planner) inThePlaceOf(written, name string) error {
	return fmt.Errorf("%s: %w: format %s would write %s in the place of its %s", b.Path, ErrRefused, b.format.Name(),
		tensor.Quote(written), tensor.Quote(name))
}
