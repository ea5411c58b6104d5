package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func inspectCommand() *cobra.Command {
	var asJSON, tree bool
	var o lorakit.ReadOptions
	var parse func([]string) ([]lorakit.Adapter, error)
	c := &cobra.Command{
		Use:   "inspect PATH",
		Short: "Show what is in a checkpoint or an adapter",
		Long: `inspect reads the headers of a checkpoint, a folder or a file, and lists its weights.
A quantised weight is one line, companions included.

Of an adapter it lists the modules with their factors, rank, alpha, scaling and the norm
of what they add, and says what its config does.`,
		Example: `  lorakit inspect llama-nf4
  lorakit inspect llama-nf4 --tree
  lorakit inspect model.safetensors --json
  lorakit inspect my-lora`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			debug.SetGCPercent(400) // it ends soon, and what it reads it holds
			w := c.OutOrStdout()
			r, adapter, err := inspect(c, args[0], o)
			if err != nil {
				return err
			}
			if adapter {
				shown, err := inspectAdapter(c, args[0], parse, o, asJSON)
				if shown || err != nil {
					return err
				}
			}
			if err := useless(c, "is for an adapter", "alpha", "expert-layout", "component"); err != nil {
				return err
			}
			if r == nil { // a folder with both
				if r, err = lorakit.Inspect(c.Context(), args[0], o); err != nil {
					return err
				}
			}
			switch {
			case asJSON:
				return printJSON(w, r)
			case tree:
				printTree(w, r)
			default:
				printMetadata(w, r)
				printTensors(w, r)
			}
			printSummary(w, r)
			return nil
		},
	}
	parse = adapterFlags(c)
	linkFlag(c, &o.FollowLinks)
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	c.Flags().BoolVar(&tree, "tree", false, "show modules as a tree, equal layers once")
	return c
}

// inspect reads what is no adapter. A file is read to tell, and its header, which may be large, once.
func inspect(c *cobra.Command, path string, o lorakit.ReadOptions) (r *lorakit.Inspection, adapter bool, err error) {
	if info, err := os.Stat(path); (err != nil || !info.Mode().IsRegular()) && lorakit.IsAdapter(path) {
		return nil, true, nil
	}
	r, err = lorakit.Inspect(c.Context(), path, o)
	return r, err == nil && r.Adapter, err
}

// inspectAdapter shows an adapter. Of a file that is none by itself, such as the tensors of a PEFT folder without its
// config, it says so and shows nothing: the tensors are shown in its place.
func inspectAdapter(c *cobra.Command, path string, parse func([]string) ([]lorakit.Adapter, error),
	o lorakit.ReadOptions, asJSON bool) (shown bool, err error) {
	a, err := parse([]string{path})
	if err != nil {
		return false, err
	}
	a[0].Path = path // an equals sign in it is part of the name
	r, err := lorakit.InspectAdapter(c.Context(), a[0], o)
	if info, e := os.Stat(path); errors.Is(err, lorakit.ErrUnsupported) && e == nil && !info.IsDir() {
		fmt.Fprintf(c.ErrOrStderr(), "note: its tensors are shown as they are: %s\n", escape(withHints(err)))
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := useless(c, "is for checkpoints", "tree"); err != nil {
		return false, err
	}
	if asJSON {
		return true, printJSON(c.OutOrStdout(), r)
	}
	printAdapter(c.OutOrStdout(), r)
	for _, n := range r.Notices {
		fmt.Fprintln(c.ErrOrStderr(), "note: "+escape(n))
	}
	return true, nil
}

// printMetadata lists what is stored with the tensors, but for a mere note of who has saved them.
func printMetadata(w io.Writer, r *lorakit.Inspection) {
	t := newTable(w, "KEY", "TYPE", "VALUE")
	for _, v := range r.Values {
		if v.Name != "format" {
			t.row(v.Name, v.Type, v.String())
		}
	}
	if len(t.rows) > 1 {
		t.flush()
		fmt.Fprintln(w)
	}
}

func printTensors(w io.Writer, r *lorakit.Inspection) {
	t := newTable(w, "DTYPE", "TENSOR", "SHAPE", "SIZE", "STORED AS", "KIND")
	t.names, t.spare = []string{"TENSOR"}, []string{"KIND", "SIZE", "DTYPE"}
	for _, x := range r.Tensors {
		t.row(dtypeOf(&x), x.Name, x.Shape.String(), humanize.IBytes(uint64(x.Bytes)), cmp.Or(x.Scheme, "plain"), x.Kind)
	}
	t.flush()
}

// dtypeOf is the type of a tensor's values, where it can be read.
func dtypeOf(t *lorakit.InspectedTensor) string {
	if !t.DType.Valid() {
		return "-"
	}
	return t.DType.String()
}

func printSummary(w io.Writer, r *lorakit.Inspection) {
	fmt.Fprintln(w)
	if r.Architecture != "" || r.ModelType != "" {
		known := ""
		if !r.Known {
			known = " (not known: chosen by names and shapes)"
		}
		fmt.Fprintf(w, "architecture  %s%s\n", escape(cmp.Or(r.Architecture, r.ModelType)), known)
	}
	fmt.Fprintf(w, "format        %s, %s\n", r.Format, count(len(r.Files), "file"))
	var stored []string
	for _, x := range r.Tensors {
		if x.Scheme != "" && !slices.Contains(stored, x.Scheme) {
			stored = append(stored, x.Scheme)
		}
	}
	fmt.Fprintf(w, "stored as     %s\n", cmp.Or(strings.Join(stored, "; "), "plain"))
	fmt.Fprintf(w, "parameters    %s in %d tensors\n", humanize.Comma(r.Parameters), len(r.Tensors))
	fmt.Fprintf(w, "size          %s\n", humanize.IBytes(uint64(r.Bytes)))
}

// node is a module: what its name leads to.
type node struct {
	name     string
	children []*node
	byName   map[string]*node
	tensor   *lorakit.InspectedTensor
	bytes    int64
	count    int // how many equal neighbours it stands for
	last     string
}

func (n *node) child(name string) *node {
	if c, ok := n.byName[name]; ok {
		return c
	}
	c := &node{name: name, byName: map[string]*node{}, count: 1, last: name}
	n.byName[name] = c
	n.children = append(n.children, c)
	return c
}

// maxDepth is deeper than any model is nested; the rest of a longer name is one part.
const maxDepth = 32

// printTree shows the modules. Numbered ones that are alike, layers mostly, are shown once, as 0-31.
func printTree(w io.Writer, r *lorakit.Inspection) {
	root := &node{byName: map[string]*node{}}
	for i := range r.Tensors {
		t := &r.Tensors[i]
		n := root
		n.bytes += t.Bytes
		for _, part := range strings.SplitN(t.Name, ".", maxDepth) {
			n = n.child(part)
			n.bytes += t.Bytes
		}
		n.tensor = t
	}
	root.fold()
	root.print(w, "")
}

// fold sorts the children, joins neighbours with numbers for names whose trees are alike, and returns what the tree
// looks like.
func (n *node) fold() string {
	slices.SortFunc(n.children, func(a, b *node) int {
		if isNumber(a.name) && isNumber(b.name) {
			return cmp.Or(cmp.Compare(len(a.name), len(b.name)), cmp.Compare(a.name, b.name))
		}
		return cmp.Compare(a.name, b.name)
	})
	var look strings.Builder
	if n.tensor != nil {
		fmt.Fprint(&look, n.tensor.DType, n.tensor.Shape, n.tensor.Scheme)
	}
	var kept []*node
	last := ""
	for _, c := range n.children {
		l := c.fold()
		if k := len(kept) - 1; k >= 0 && l == last && isNumber(c.name) && isNumber(kept[k].name) {
			kept[k].count++
			kept[k].last = c.name
			kept[k].bytes += c.bytes
		} else {
			kept = append(kept, c)
		}
		fmt.Fprintf(&look, "(%q %s)", c.name, l)
		last = l
	}
	n.children = kept
	return look.String()
}

func isNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

func (n *node) print(w io.Writer, indent string) {
	for i, c := range n.children {
		branch, next := "├─ ", "│  "
		if i == len(n.children)-1 {
			branch, next = "└─ ", "   "
		}
		name := shorten(escape(c.name), longestName)
		if c.count > 1 {
			name += "-" + c.last
		}
		line := indent + branch + name
		if c.tensor != nil {
			line += fmt.Sprintf("  %s %v %s", dtypeOf(c.tensor), c.tensor.Shape, c.tensor.Scheme)
		} else {
			line += "  " + humanize.IBytes(uint64(c.bytes))
		}
		fmt.Fprintln(w, strings.TrimRight(line, " "))
		c.print(w, indent+next)
	}
}
