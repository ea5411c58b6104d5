package pipeline

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Metadatum is a pair of a plan's metadata with its type, which JSON by itself does not keep.
type Metadatum struct {
	Name string `json:"name"`
	// Type is that of the value in Go: string, uint32, []float32, …
	Type string `json:"type"`
	// Values are the value's text, or those of the elements of a list.
	Values []string `json:"values"`
}

// metadata writes pairs down.
func metadata(m formats.Metadata) []Metadatum {
	list := make([]Metadatum, len(m))
	for i, p := range m {
		list[i] = Metadatum{p.Name, fmt.Sprintf("%T", p.Value), []string{}}
		v := reflect.ValueOf(p.Value)
		if v.Kind() != reflect.Slice {
			list[i].Values = append(list[i].Values, p.Text())
			continue
		}
		for k := range v.Len() {
			list[i].Values = append(list[i].Values, formats.Pair{Value: v.Index(k).Interface()}.Text())
		}
	}
	return list
}

// metadata reads them back.
func (p *Plan) metadata() (formats.Metadata, error) {
	var m formats.Metadata
	for _, d := range p.Metadata {
		v, err := d.value()
		if err != nil {
			return nil, fmt.Errorf("%w: metadata %s: %w", ErrOtherPlan, tensor.Quote(d.Name), err)
		}
		m = append(m, formats.Pair{Name: d.Name, Value: v})
	}
	return m, nil
}

func (d Metadatum) value() (any, error) {
	typ, list := strings.CutPrefix(d.Type, "[]")
	switch typ {
	case "string":
		return oneOrAll(d, list, func(s string) (string, error) { return s, nil })
	case "bool":
		return oneOrAll(d, list, strconv.ParseBool)
	case "float32":
		return oneOrAll(d, list, func(s string) (float32, error) {
			x, err := strconv.ParseFloat(s, 32)
			return float32(x), err
		})
	case "float64":
		return oneOrAll(d, list, func(s string) (float64, error) { return strconv.ParseFloat(s, 64) })
	case "int8":
		return oneOrAll(d, list, signed[int8](8))
	case "int16":
		return oneOrAll(d, list, signed[int16](16))
	case "int32":
		return oneOrAll(d, list, signed[int32](32))
	case "int64":
		return oneOrAll(d, list, signed[int64](64))
	case "uint8":
		return oneOrAll(d, list, unsigned[uint8](8))
	case "uint16":
		return oneOrAll(d, list, unsigned[uint16](16))
	case "uint32":
		return oneOrAll(d, list, unsigned[uint32](32))
	case "uint64":
		return oneOrAll(d, list, unsigned[uint64](64))
	}
	return nil, fmt.Errorf("found the type %s, expected one that metadata have", tensor.Quote(d.Type))
}

// oneOrAll reads the value, or all elements of a list.
func oneOrAll[T any](d Metadatum, list bool, parse func(string) (T, error)) (any, error) {
	all := make([]T, len(d.Values))
	for i, s := range d.Values {
		var err error
		if all[i], err = parse(s); err != nil {
			return nil, err
		}
	}
	switch {
	case list:
		return all, nil
	case len(all) != 1:
		return nil, fmt.Errorf("found %d values of one %s", len(all), d.Type)
	}
	return all[0], nil
}

func signed[T int8 | int16 | int32 | int64](bits int) func(string) (T, error) {
	return func(s string) (T, error) {
		x, err := strconv.ParseInt(s, 10, bits)
		return T(x), err
	}
}

func unsigned[T uint8 | uint16 | uint32 | uint64](bits int) func(string) (T, error) {
	return func(s string) (T, error) {
		x, err := strconv.ParseUint(s, 10, bits)
		return T(x), err
	}
}
