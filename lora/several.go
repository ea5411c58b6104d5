package lora

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/internal/nearest"
	"github.com/lorakit/lorakit/storage"
)

// ErrOption says that an option has a value that is wrong whatever the files hold.
var ErrOption = errors.New("wrong option")

// UnknownOption is the error of an option whose value is none of those that are known: it names the nearest.
func UnknownOption(what, value string, known ...string) error {
	return fmt.Errorf("%w: %s %q is unknown; known are %s%s", ErrOption, what, value, strings.Join(known, ", "),
		nearest.Suggestion(value, known))
}

// Source is an adapter in any dialect that is known (Dialects): a PEFT or an MLX folder, a file of kohya,
// diffusers, loralib or llama.cpp.
type Source struct {
	Path   string
	Weight float64 // the factor of its delta; 0 stands for 1
	// Alpha is that of a loralib file, which does not hold it.
	Alpha float64
	// ExpertLayout is "rank_major" or "grouped_by_expert", for a PEFT folder whose config does not say how
	// its stacks of experts lie; empty is PEFT's own rank_major.
	ExpertLayout string
	// Component, where not empty, is the one part of a pipeline whose modules are taken, for an adapter in one file that
	// is for several: "unet", "text_encoder".
	Component string
	// Base is what a GGUF adapter is for, whose names only it tells.
	Base *Base
}

// Paths lists the paths of adapters.
func Paths(sources []Source) []string {
	var list []string
	for _, s := range sources {
		list = append(list, s.Path)
	}
	return list
}

// Several are adapters that are used together, in this order.
type Several []Weighted

// Close closes the files of all.
func (s Several) Close() {
	for _, a := range s {
		a.Close()
	}
}

// OpenAll opens adapters. An Alpha or an ExpertLayout that none of them needs is an error of kind ErrOption.
func OpenAll(ctx context.Context, sources []Source, o storage.Options) (Several, error) {
	return openAll(ctx, sources, o, false)
}

func openAll(ctx context.Context, sources []Source, o storage.Options, conditional bool) (Several, error) {
	var list Several
	needsAlpha, needsLayout := false, false
	for _, s := range sources {
		if s.Weight == 0 {
			s.Weight = 1
		}
		if math.IsNaN(s.Weight) || math.IsInf(s.Weight, 0) {
			list.Close()
			return nil, fmt.Errorf("%w: the weight of %s is %v, expected a finite number", ErrOption, s.Path, s.Weight)
		}
		a, err := openSource(ctx, s, o, conditional)
		if err != nil {
			list.Close()
			return nil, err
		}
		list = append(list, Weighted{Adapter: a, Weight: s.Weight})
		needsAlpha, needsLayout = needsAlpha || a.Dialect == LoRALib, needsLayout || a.Stacked()
	}
	for _, s := range sources {
		switch {
		case !needsAlpha && s.Alpha != 0:
			list.Close()
			return nil, fmt.Errorf("%w: an alpha is given, and %s holds its own; it is for loralib files, which do not",
				ErrOption, s.Path)
		case !needsLayout && s.ExpertLayout != "":
			list.Close()
			return nil, fmt.Errorf("%w: the expert layout %s is given, and %s has no experts whose layout is open",
				ErrOption, s.ExpertLayout, s.Path)
		}
	}
	return list, nil
}

// OpenWithoutBase opens adapters that are used without their base: one with tensors of modules that its config leaves
// out is an error. What they add to each weight is not added to any, so aLoRA is taken too.
func OpenWithoutBase(ctx context.Context, sources []Source, o storage.Options) (Several, error) {
	list, err := openAll(ctx, sources, o, true)
	if err != nil {
		return nil, err
	}
	for _, a := range list {
		if err := a.CheckTargets(); err != nil {
			list.Close()
			return nil, err
		}
	}
	return list, nil
}

// Negate makes the weights those of adapters that are taken out of what they were merged into. A part that cannot be
// subtracted is an error.
func (s Several) Negate() error {
	if slices.ContainsFunc(s, func(a Weighted) bool { return a.Multiplies() }) {
		slices.Reverse(s) // the last is taken out first
	}
	for i := range s {
		s[i].Weight = -s[i].Weight
		if err := s[i].Subtractable(); err != nil {
			return err
		}
	}
	return nil
}

// Paths are the files on this machine that the adapters are read from, wherever links have led.
func (s Several) Paths() []string {
	var list []string
	for _, a := range s {
		list = append(list, a.Paths()...)
	}
	return list
}

func openSource(ctx context.Context, s Source, o storage.Options, conditional bool) (*Adapter, error) {
	dir, name, err := storage.Resolve(s.Path, o)
	if err != nil {
		return nil, err
	}
	return OpenIn(ctx, dir, name, OpenOptions{Alpha: s.Alpha, ExpertLayout: s.ExpertLayout, Component: s.Component,
		Base: s.Base, Conditional: conditional})
}
