package models

import (
	_ "embed"
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
)

// diffusersJSON has the names of the modules of diffusers' models, see generate/diffusers_names.py.
//
//go:embed diffusers.json
var diffusersJSON []byte

// diffusersModules are the modules of diffusers' models by flatKey, and the component that each is of.
var diffusersModules = sync.OnceValue(func() map[string]map[string]string {
	var data struct {
		UNet        []string `json:"unet"`
		Transformer []string `json:"transformer"`
	}
	if err := json.Unmarshal(diffusersJSON, &data); err != nil {
		panic(err) // it is part of the program
	}
	byKey := map[string]map[string]string{}
	add := func(component string, list []string) {
		for _, pattern := range list {
			key := flatKey(pattern)
			if byKey[key] == nil {
				byKey[key] = map[string]string{}
			}
			of := component
			if _, both := byKey[key][pattern]; both {
				of = ""
			}
			byKey[key][pattern] = of
		}
	}
	add("unet", data.UNet)
	add("transformer", data.Transformer)
	return byKey
})

// DiffusersComponent says of which component of diffusers' pipelines a module is, "unet" or "transformer", by the
// name that it has there: "down_blocks.0.resnets.1.conv1". It is "" where models of both have the name. The second
// result tells whether any has.
func DiffusersComponent(module string) (component string, known bool) {
	pattern := numbered(module)
	component, known = diffusersModules()[flatKey(pattern)][pattern]
	return component, known
}

// UnflattenDiffusers lists the modules of diffusers' U-Nets and transformers, and of those that other authors' files
// hold under names of their own, whose names become the given one when underscores are written for their dots.
func UnflattenDiffusers(flat string) (list []string) {
	key := flatKey(flat)
	for pattern := range diffusersModules()[key] {
		if name, ok := unflatten(pattern, flat); ok {
			list = append(list, name)
		}
	}
	for _, pattern := range originalNames()[key] {
		if name, ok := unflatten(pattern, flat); ok && !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	slices.Sort(list)
	return list
}

// numbered is a name with # for the parts that are numbers.
func numbered(name string) string {
	parts := strings.Split(name, ".")
	for i, p := range parts {
		if isNumber(p) {
			parts[i] = "#"
		}
	}
	return strings.Join(parts, ".")
}
