package lock

import "fmt"

// Summary is a plugin in a list.
type Summary struct {
	Name     string   `json:"name"`
	Version  string   `json:"version"`
	Protocol int      `json:"protocol"`
	Digest   string   `json:"digest"`
	State    State    `json:"state"`
	Formats  []string `json:"formats"` // names
	Schemes  []string `json:"schemes"` // types
	// Problem says in a line what is wrong, where State is not OK.
	Problem string `json:"problem"`
}

// Summary sums a plugin up. It goes by sizes and times, as State does.
func (f *Folder) Summary(p *Plugin) Summary {
	s := Summary{Name: p.Name, Version: p.Version, Protocol: p.Protocol, Digest: p.Digest}
	s.State, s.Problem = f.State(p)
	for _, x := range p.Formats {
		s.Formats = append(s.Formats, x.Name)
	}
	for _, x := range p.Schemes {
		s.Schemes = append(s.Schemes, x.Types...)
	}
	return s
}

// Verification is what a look at all files of a plugin tells.
type Verification struct {
	Name  string `json:"name"`
	State State  `json:"state"`
	Report
	// Err is what is wrong, where State is not OK.
	Err error `json:"-"`
}

// Verification reads all files of a plugin, and says whether it can be started.
func (f *Folder) Verification(p *Plugin) (Verification, error) {
	r, err := f.Verify(p)
	if err != nil {
		return Verification{}, err
	}
	v := Verification{Name: p.Name, State: r.State(), Report: r, Err: r.Err(p)}
	if err := f.usable(p); v.State == OK && err != nil {
		v.State, v.Err = Incompatible, fmt.Errorf("plugin %s: %w", p.Name, err)
	}
	return v, nil
}

// Notices say, in a sentence each, what whoever installs the plugin is to know.
func (p *Plugin) Notices() []string {
	list := []string{"the plugin " + p.Name + " is code that runs with your rights whenever lorakit uses it"}
	if i := p.Interpreter; i != nil {
		version := ""
		if i.Version != "" {
			version = " (" + i.Version + ")"
		}
		list = append(list, fmt.Sprintf("it is run by %s%s: that program is pinned, and packages that it loads from outside "+
			"of the plugin's folder are not", i.Path, version))
		if isScript(i.Path) {
			list = append(list, i.Path+" is a script: the program that it starts is not pinned")
		}
	}
	return list
}
