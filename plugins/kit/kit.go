package kit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/quant"
)

// Subject is what is checked.
type Subject struct {
	Name    string
	Formats []formats.Format
	Schemes []quant.Scheme
	// Plugin is what the formats and schemes come from; nil for those that are built in.
	Plugin *host.Probe
	// Samples, where it is not empty, is a folder with files of the formats, made elsewhere.
	Samples string
	// Kinds are kinds of errors by which its formats refuse files, besides those of package formats.
	Kinds []error
	// Only, where it is not nil, lists the checks to make.
	Only []string
	// Done, where it is not nil, is called with each check as soon as it is made.
	Done func(Check)
}

// Installed is a plugin that is installed. Its samples are the files in the folder testdata or samples of its package.
func Installed(folder *lock.Folder, p *lock.Plugin) Subject {
	probe := host.NewProbe(folder, p)
	s := Subject{Name: p.Name, Formats: probe.Formats(), Schemes: probe.Schemes(), Plugin: probe}
	for _, name := range []string{"testdata", "samples"} {
		dir := filepath.Join(folder.Path(p), name)
		if info, err := os.Lstat(dir); err == nil && info.IsDir() {
			s.Samples = dir
			break
		}
	}
	return s
}

// Status is how a check has ended.
type Status string

// The ways in which a check ends.
const (
	Passed  Status = "passed"
	Failed  Status = "failed"
	Skipped Status = "skipped"
)

// Check is a check that was made.
type Check struct {
	ID     string `json:"id"`
	Status Status `json:"status"`
	// Advice is what the author of the plugin should do about a failure, in a line.
	Advice string `json:"advice"`
	// Detail is what was seen, in a line.
	Detail string `json:"detail"`
}

// Report is what the checks have found.
type Report struct {
	Name    string  `json:"name"`
	Passed  int     `json:"passed"`
	Failed  int     `json:"failed"`
	Skipped int     `json:"skipped"`
	Checks  []Check `json:"checks"`
}

// Lookup finds a check by its id.
func (r *Report) Lookup(id string) (Check, bool) {
	for _, c := range r.Checks {
		if c.ID == id {
			return c, true
		}
	}
	return Check{}, false
}

func (r *Report) add(c Check) {
	switch c.Status {
	case Passed:
		r.Passed++
	case Failed:
		r.Failed++
	case Skipped:
		r.Skipped++
	}
	r.Checks = append(r.Checks, c)
}

// run is one run of the checks.
type run struct {
	Subject
	dir     string // a scratch folder
	folders int
	formats []*format
	schemes []*scheme
	current string   // the id of the check that is being made
	silent  []string // the ids of those in which the plugin gave no answer
	broken  string   // why no more can be made
}

// mostSilent is in how many checks a plugin may give no answer, which takes half a minute each, before the others are
// left out.
const mostSilent = 2

// Run makes the checks, one after the other. An error is that they could not be made, or not all: what was found until
// then is returned with it.
func Run(ctx context.Context, s Subject) (*Report, error) {
	dir, err := os.MkdirTemp("", "lorakit-kit-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	r := &run{Subject: s, dir: dir}
	for _, f := range s.Formats {
		r.formats = append(r.formats, newFormat(r, f))
	}
	for _, x := range s.Schemes {
		r.schemes = append(r.schemes, &scheme{run: r, Scheme: x})
	}
	if s.Plugin != nil {
		defer s.Plugin.Stop()
	}
	report := &Report{Name: s.Name, Checks: []Check{}}
	for _, c := range checks() {
		if s.Only != nil && !slices.Contains(s.Only, c.id) {
			continue
		}
		done := r.make(ctx, c)
		if ctx.Err() != nil { // what the check has seen may be no more than that
			return report, context.Cause(ctx)
		}
		report.add(done)
		if s.Done != nil {
			s.Done(done)
		}
	}
	return report, nil
}

// folder makes a new folder.
func (r *run) folder() (string, error) {
	r.folders++
	dir := filepath.Join(r.dir, fmt.Sprint(r.folders))
	return dir, os.Mkdir(dir, 0o700)
}

// skip ends a check that cannot be made.
func skip(format string, args ...any) error { return &ending{text: fmt.Sprintf(format, args...)} }

// fail ends a check, with advice of its own.
func fail(advice, format string, args ...any) error {
	return &ending{failed: true, text: fmt.Sprintf(format, args...), advice: advice}
}

// ending is how a check ends that has not passed.
type ending struct {
	failed       bool
	text, advice string
}

func (e *ending) Error() string { return e.text }

// outcome is the end of a check for one format, scheme or process.
type outcome struct {
	of     string
	detail string
	err    error
}

// make makes a check for all that it is for.
func (r *run) make(ctx context.Context, c check) Check {
	r.current = c.id
	var all []outcome
	one := func(of string, f func() (string, error)) {
		o := outcome{of: of}
		if r.broken != "" {
			o.err = skip("%s", r.broken)
		} else {
			o.detail, o.err = guarded(f)
		}
		all = append(all, o)
		r.listen(o.err)
		// What a failure has left behind is not for the next check.
		if e := (*ending)(nil); o.err != nil && r.Plugin != nil && (!errors.As(o.err, &e) || e.failed) {
			r.Plugin.Stop()
		}
	}
	what := "formats"
	switch {
	case c.format != nil:
		for _, f := range r.formats {
			one("format "+f.Name(), func() (string, error) { return c.format(ctx, f) })
		}
	case c.scheme != nil:
		what = "schemes"
		for _, s := range r.schemes {
			one("scheme "+s.Name(), func() (string, error) { return c.scheme(ctx, s) })
		}
	default:
		what = "process of its own"
		if r.Plugin != nil && (c.connected || r.Plugin.Owned()) {
			one("", func() (string, error) { return c.plugin(ctx, r) })
		}
	}
	if len(all) == 0 {
		return Check{c.id, Skipped, "", "it has no " + what}
	}
	return joined(c, all)
}

// listen notes that the plugin has given no answer, which is not waited for again and again.
func (r *run) listen(err error) {
	if r.broken != "" || !unanswered(err) || slices.Contains(r.silent, r.current) {
		return
	}
	if r.silent = append(r.silent, r.current); len(r.silent) == mostSilent {
		r.broken = "see " + strings.Join(r.silent, " and ") + ": the plugin gave no answer in time, or did not start"
	}
}

// guarded makes an error of a panic, which would end a plugin.
func guarded(f func() (string, error)) (detail string, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fail("do not panic, whatever the input is: return an error", "it panics: %s", oneLine(fmt.Sprint(p)))
		}
	}()
	return f()
}

// joined makes one of the outcomes of a check: it has failed if one has, and passed if one has and none has failed.
func joined(c check, all []outcome) Check {
	best := map[Status][]string{}
	advice := ""
	for _, o := range all {
		status, text := Passed, o.detail
		if o.err != nil {
			status, text = Failed, o.err.Error()
			e := (*ending)(nil)
			if errors.As(o.err, &e) && !e.failed {
				status = Skipped
			} else if advice == "" {
				if advice = adviceOn(o.err, c); e != nil && e.advice != "" {
					advice = e.advice
				}
			}
		}
		if len(all) > 1 && o.of != "" {
			text = o.of + ": " + text
		}
		best[status] = append(best[status], oneLine(text))
	}
	for _, s := range []Status{Failed, Passed, Skipped} {
		if len(best[s]) > 0 {
			return Check{c.id, s, advice, strings.Join(best[s], "; ")}
		}
	}
	panic("unreachable: there is an outcome")
}

// oneLine makes one line of a text, and cuts what is very long.
func oneLine(s string) string {
	const most = 600
	s = strings.Join(strings.Fields(strings.ToValidUTF8(s, "?")), " ")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
