package lorakit_test

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// fields adds the paths of a type's fields as docs/json.md writes them.
func fields(t reflect.Type, path string, to map[string]bool) {
	switch {
	case t.Kind() == reflect.Pointer:
		fields(t.Elem(), path, to)
	case path == "plan" || path == "modules[].nf4": // described in words
		to[path] = true
	case t.Kind() == reflect.Struct:
		for i := range t.NumField() {
			f := t.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch {
			case f.Anonymous && name == "":
				fields(f.Type, path, to)
			case name != "" && name != "-":
				fields(f.Type, strings.TrimPrefix(path+"."+name, "."), to)
			}
		}
	case t.Kind() == reflect.Slice && t.PkgPath() == "": // tensor.Shape and JSON as it is are values
		fields(t.Elem(), path+"[]", to)
	default:
		to[path] = true
	}
}

// TestJSONFieldsAreDocumented holds docs/json.md against the types: all fields, and no other.
func TestJSONFieldsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("docs/json.md")
	require.NoError(t, err)
	sections := map[string]string{}
	for _, s := range strings.Split(string(text), "\n## ")[1:] {
		name, body, _ := strings.Cut(s, "\n")
		sections[name] = body
	}
	checkpoint, adapter, ok := strings.Cut(sections["inspect"], "Of an adapter:")
	require.True(t, ok)
	sections["inspect"], sections["inspect of an adapter"] = checkpoint, adapter
	field := regexp.MustCompile("`([^`]+)`")
	for section, v := range map[string]any{
		"convert, merge, unmerge": lorakit.ConvertResult{},
		"verify":                  lorakit.Verification{},
		"attach":                  lorakit.Attachment{},
		"extract":                 lorakit.Extraction{},
		"combine, resize":         lorakit.Combination{},
		"analyze":                 lorakit.Analysis{},
		"estimate":                lorakit.Estimation{},
		"validate":                lorakit.Validation{},
		"inspect":                 lorakit.Inspection{},
		"inspect of an adapter":   lorakit.AdapterInspection{},
		"diff":                    lorakit.Comparison{},
		"formats, version":        lorakit.Known{},
		"plugin list":             lorakit.PluginList{},
		"plugin install":          lorakit.PluginInstallation{},
		"plugin verify":           lorakit.PluginVerification{},
	} {
		want := map[string]bool{}
		fields(reflect.TypeOf(v), "", want)
		got := map[string]bool{}
		for line := range strings.Lines(sections[section]) {
			if cells := strings.Split(line, "|"); len(cells) == 4 {
				for _, m := range field.FindAllStringSubmatch(cells[1], -1) {
					got[m[1]] = true
				}
			}
		}
		delete(got, "adapters") // heads the list of its fields
		delete(got, "assumed_shape")
		assert.Equal(t, keys(want), keys(got), section)
	}
}

func keys(m map[string]bool) []string {
	var list []string
	for k := range m {
		list = append(list, k)
	}
	slices.Sort(list)
	return list
}

// TestLinksInDocs: what a page links to is there, headings too.
func TestLinksInDocs(t *testing.T) {
	pages, err := filepath.Glob("docs/*.md")
	require.NoError(t, err)
	pages = append(pages, "README.md", "CHANGELOG.md", "fixtures/README.md")
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	links := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		require.NoError(t, err)
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			links++
			file, heading, _ := strings.Cut(m[1], "#")
			target := filepath.Join(filepath.Dir(page), filepath.FromSlash(file))
			if file == "" {
				target = page
			}
			there, err := os.ReadFile(target)
			if assert.NoError(t, err, "%s links to %s", page, m[1]) && heading != "" {
				assert.Contains(t, headings(string(there)), heading, "%s links to %s", page, m[1])
			}
		}
	}
	assert.Greater(t, links, 10)
}

// headings are the anchors of a page as GitHub makes them.
func headings(text string) []string {
	var list []string
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") {
			h := strings.ToLower(strings.TrimSpace(strings.TrimLeft(line, "#")))
			h = regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(h, "")
			list = append(list, strings.ReplaceAll(h, " ", "-"))
		}
	}
	return list
}
