package main

import (
	"fmt"
	"io"
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

func (silent) update(lorakit.Progress) {}
func (silent) end(bool)                {}

// bar is a bar with rate and time left.
type bar struct {
	w     io.Writer
	title string
	all   *mpb.Progress
	bar   *mpb.Bar
}

func (b *bar) update(p lorakit.Progress) {
	if b.all == nil {
		b.all = mpb.New(mpb.WithOutput(b.w), mpb.WithWidth(40))
		b.bar = b.all.AddBar(p.Total,
			mpb.PrependDecorators(decor.Name(shorten(b.title, 24)+" ")),
			mpb.AppendDecorators(
				decor.CountersKibiByte(" % .1f / % .1f  "),
				decor.AverageSpeed(decor.SizeB1024(0), "% .1f  "),
				decor.AverageETA(decor.ET_STYLE_GO), decor.Name(" left")),
			mpb.BarRemoveOnComplete())
	}
	b.bar.SetCurrent(p.Done)
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
	w    io.Writer
	next time.Duration
}

const plainEvery = 5 * time.Second

func (l *plain) update(p lorakit.Progress) {
	if p.Elapsed < l.next+plainEvery || p.Total == 0 {
		return
	}
	l.next = p.Elapsed
	rate := float64(p.Done) / p.Elapsed.Seconds()
	left := "unknown"
	if rate > 0 {
		left = time.Duration(float64(p.Total-p.Done) / rate * 1e9).Round(time.Second).String()
	}
	fmt.Fprintf(l.w, "%d %% of %s, %s/s, %s left, %d of %d shards\n", 100*p.Done/p.Total, humanize.IBytes(uint64(p.Total)),
		humanize.IBytes(uint64(rate)), left, p.Shards, p.TotalShards)
}

func (l *plain) end(bool) {}

// jsonLines writes an object a time, for other programs.
type jsonLines struct{ w io.Writer }

func (j *jsonLines) update(p lorakit.Progress) {
	line := struct {
		Done        int64   `json:"bytes_done"`
		Total       int64   `json:"bytes_total"`
		Shards      int     `json:"shards_done"`
		TotalShards int     `json:"shards_total"`
		Seconds     float64 `json:"seconds"`
	}{p.Done, p.Total, p.Shards, p.TotalShards, p.Elapsed.Seconds()}
	if b, err := json.Marshal(line); err == nil {
		fmt.Fprintf(j.w, "%s\n", b)
	}
}

func (j *jsonLines) end(bool) {}
