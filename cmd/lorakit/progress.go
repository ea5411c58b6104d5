package main

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/go-json-experiment/json"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/lorakit/lorakit"
)

// progress shows how far a long run is.
type progress interface {
	update(lorakit.Progress)
	validate(lorakit.ValidateProgress)
	end(done bool)
}

// newProgress makes the progress that --progress names: auto is a bar on a terminal and plain lines elsewhere.
func newProgress(kind string, w io.Writer, title string) (progress, error) {
	if kind == "auto" {
		kind = "plain"
		if _, ok := terminalWidth(w); ok {
			kind = "bar"
		}
	}
	switch kind {
	case "bar":
		return &bar{w: w, title: title}, nil
	case "plain":
		return &plain{w: w}, nil
	case "json":
		return &jsonLines{w: w}, nil
	case "none":
		return silent{}, nil
	}
	return nil, oneOf("progress", kind, "auto", "bar", "plain", "json", "none")
}

type silent struct{}

func (silent) update(lorakit.Progress)           {}
func (silent) validate(lorakit.ValidateProgress) {}
func (silent) end(bool)                          {}

// bar is a bar with rate and time left.
type bar struct {
	w     io.Writer
	title string
	all   *mpb.Progress
	bar   *mpb.Bar
	stage atomic.Value // string, what is done now

	measured bool // what the bar shows is the measuring for a budget
}

func (b *bar) update(p lorakit.Progress) {
	if b.measured && !p.Measuring { // the bar of the run begins
		b.end(true)
		b.all = nil
	}
	b.measured = p.Measuring
	b.draw(p.Done, p.Total, decor.CountersKibiByte(" % .1f / % .1f  "), decor.AverageSpeed(decor.SizeB1024(0), "% .1f  "))
}

func (b *bar) validate(p lorakit.ValidateProgress) {
	b.stage.Store(p.Stage)
	stage := decor.Any(func(decor.Statistics) string { return fmt.Sprintf(" %-10v  ", b.stage.Load()) })
	b.draw(int64(p.Done), int64(p.Total), stage, decor.AverageSpeed(0, "%.1f passes/s  "))
}

// draw shows so much of all, and beside it what decorators make of it.
func (b *bar) draw(done, total int64, beside ...decor.Decorator) {
	if b.all == nil {
		b.all = mpb.New(mpb.WithOutput(b.w), mpb.WithWidth(40))
		b.bar = b.all.AddBar(total,
			mpb.PrependDecorators(decor.Name(shorten(b.title, 24)+" ")),
			mpb.AppendDecorators(append(beside, decor.AverageETA(decor.ET_STYLE_GO), decor.Name(" left"))...),
			mpb.BarRemoveOnComplete())
	}
	b.bar.SetCurrent(done)
}

func (b *bar) end(done bool) {
	if b.all == nil {
		return
	}
	if done {
		b.bar.SetTotal(-1, true)
	} else {
		b.bar.Abort(true)
	}
	b.all.Wait()
}

// plain writes a line every few seconds.
type plain struct {
	w        io.Writer
	next     time.Duration
	measured bool // as for a bar
}

const plainEvery = 5 * time.Second

func (l *plain) update(p lorakit.Progress) {
	if p.Measuring != l.measured {
		l.measured, l.next = p.Measuring, 0
	}
	if !l.due(p.Elapsed, p.Total) {
		return
	}
	rate, left := pace(p.Done, p.Total, p.Elapsed)
	if p.Measuring {
		fmt.Fprintf(l.w, "measuring types for the budget: %d %% of %s, %s/s, %s left\n", 100*p.Done/p.Total,
			humanize.IBytes(uint64(p.Total)), humanize.IBytes(uint64(rate)), left)
		return
	}
	fmt.Fprintf(l.w, "%d %% of %s, %s/s, %s left, %d of %d shards\n", 100*p.Done/p.Total, humanize.IBytes(uint64(p.Total)),
		humanize.IBytes(uint64(rate)), left, p.Shards, p.TotalShards)
}

func (l *plain) validate(p lorakit.ValidateProgress) {
	if !l.due(p.Elapsed, int64(p.Total)) {
		return
	}
	rate, left := pace(int64(p.Done), int64(p.Total), p.Elapsed)
	fmt.Fprintf(l.w, "%s: %d %% of all, %.1f passes/s, %s left\n", p.Stage, 100*p.Done/p.Total, rate, left)
}

// due reports whether it is time for a line.
func (l *plain) due(elapsed time.Duration, total int64) bool {
	if elapsed < l.next+plainEvery || total == 0 {
		return false
	}
	l.next = elapsed
	return true
}

// pace is how much is done a second, and the time that is left.
func pace(done, total int64, elapsed time.Duration) (rate float64, left string) {
	rate = float64(done) / elapsed.Seconds()
	if rate <= 0 {
		return rate, "unknown"
	}
	return rate, time.Duration(float64(total-done) / rate * 1e9).Round(time.Second).String()
}

func (l *plain) end(bool) {}

// jsonLines writes an object a time, for other programs.
type jsonLines struct{ w io.Writer }

func (j *jsonLines) update(p lorakit.Progress) {
	j.print(struct {
		Measuring   bool    `json:"measuring,omitempty"`
		Done        int64   `json:"bytes_done"`
		Total       int64   `json:"bytes_total"`
		Shards      int     `json:"shards_done"`
		TotalShards int     `json:"shards_total"`
		Seconds     float64 `json:"seconds"`
	}{p.Measuring, p.Done, p.Total, p.Shards, p.TotalShards, p.Elapsed.Seconds()})
}

func (j *jsonLines) validate(p lorakit.ValidateProgress) {
	j.print(struct {
		Stage   string  `json:"stage"`
		Done    int     `json:"passes_done"`
		Total   int     `json:"passes_total"`
		Seconds float64 `json:"seconds"`
	}{p.Stage, p.Done, p.Total, p.Elapsed.Seconds()})
}

func (j *jsonLines) print(line any) {
	if b, err := json.Marshal(line); err == nil {
		fmt.Fprintf(j.w, "%s\n", b)
	}
}

func (j *jsonLines) end(bool) {}
