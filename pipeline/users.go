package pipeline

import (
	"cmp"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/quant"
)

// user is a format or scheme that reads or makes bytes of a result. What it has to say of itself it says by methods
// that not all have:
//
//	Version() string            another version may make other bytes
//	Memory(streams int) int64   what the host needs for it, besides tiles, while so many goroutines use it at once
type user struct {
	name    string // with its kind
	is      any
	workers bool // each worker uses it
	files   bool // it writes files itself, one at a time
}

// memory is what the host needs for it with so many workers.
func (u user) memory(workers int) int64 {
	var bytes int64
	streams := 0
	if u.workers {
		streams += workers
	}
	if u.files {
		streams++
		bytes += streamChunk
	}
	if m, ok := u.is.(interface{ Memory(streams int) int64 }); ok {
		bytes += max(m.Memory(streams), 0)
	}
	return bytes
}

// users lists the formats that are read and written, and the schemes that weights are decoded from or encoded to.
func (p *Plan) users(m *Merged) ([]user, error) {
	registry := cmp.Or(m.Base.Formats, formats.Default)
	written, err := registry.Lookup(p.Format)
	if err != nil {
		return nil, err
	}
	list := []user{{name: "format " + written.Name(), is: written, files: p.StreamedShards() > 0}}
	if source := m.Base.Format; source != nil && source.Name() == written.Name() {
		list[0].workers = true
	} else if source != nil {
		list = append(list, user{name: "format " + source.Name(), is: source, workers: true})
	}
	types, schemes := map[string]bool{}, map[string]bool{}
	use := func(typ string) error {
		if types[typ] {
			return nil
		}
		types[typ] = true
		s, err := m.Base.Schemes.ForType(typ)
		if err == nil && !schemes[s.Name()] {
			schemes[s.Name()] = true
			list = append(list, user{name: "scheme " + s.Name(), is: s, workers: true})
		}
		return err
	}
	copied := map[string]bool{}
	for i := range p.Shards {
		for k := range p.Shards[i].Jobs {
			j := &p.Shards[i].Jobs[k]
			if j.Copy {
				copied[j.Weight] = true
			}
			for _, spec := range []*quant.Spec{j.Encode, j.RoundTrip} {
				if spec == nil {
					continue
				}
				if err := use(spec.Type); err != nil {
					return nil, err
				}
			}
		}
	}
	for _, w := range m.Weights {
		for _, of := range []*checkpoint.Weight{w.Weight, w.base} {
			if of == nil || copied[w.Name] {
				continue
			}
			for _, d := range of.Decoders() {
				if err := use(d.Spec().Type); err != nil {
					return nil, err
				}
			}
		}
	}
	return list, nil
}

// putVersions notes the versions of what makes the result.
func (p *Plan) putVersions(m *Merged) error {
	users, err := p.users(m)
	if err != nil {
		return err
	}
	for _, u := range users {
		if v, ok := u.is.(interface{ Version() string }); ok {
			if p.Versions == nil {
				p.Versions = map[string]string{}
			}
			p.Versions[u.name] = v.Version()
		}
	}
	return nil
}
