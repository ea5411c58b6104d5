package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func pluginCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "plugin",
		Short: "Install and look after plugins: formats and schemes of others",
		Long: `A plugin is a program that teaches lorakit a format or a quantisation scheme. It is
installed once; then each command knows its formats as it knows its own, and starts
the plugin when it needs it.

Plugins are kept in $LORAKIT_PLUGIN_DIR, else in lorakit/plugins in your configuration
folder. Their files are pinned: one that was changed is not started.`,
		Example: `  lorakit plugin install ./lorakit-flax
  lorakit plugin list`,
	}
	c.AddCommand(pluginListCommand(), pluginInstallCommand(), pluginRemoveCommand(), pluginVerifyCommand(),
		pluginTestCommand())
	return c
}

func pluginListCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List the installed plugins, and whether they are as they were installed",
		Long: `list compares the sizes and times of the plugins' files with those that were pinned, and
starts no plugin. verify reads the files.`,
		Example: `  lorakit plugin list`,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := lorakit.Plugins()
			if err != nil {
				return err
			}
			w := c.OutOrStdout()
			if asJSON {
				return printJSON(w, r)
			}
			if len(r.Plugins) == 0 {
				fmt.Fprintf(w, "no plugins in %s\n", escape(r.Dir))
				return nil
			}
			t := newTable(w, "PLUGIN", "VERSION", "STATE", "FORMATS", "SCHEMES")
			t.names, t.spare = []string{"FORMATS", "SCHEMES"}, []string{"VERSION"}
			for _, p := range r.Plugins {
				t.row(p.Name, p.Version, string(p.State), strings.Join(p.Formats, " "), strings.Join(p.Schemes, " "))
			}
			t.flush()
			for _, p := range r.Plugins {
				if p.Problem != "" {
					fmt.Fprintf(w, "%s: %s\n", p.Name, escape(p.Problem))
				}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

func pluginInstallCommand() *cobra.Command {
	var asJSON bool
	var o lorakit.InstallPluginOptions
	c := &cobra.Command{
		Use:   "install PATH",
		Short: "Install a plugin: an executable, or a folder with a plugin.json",
		Long: `install copies the plugin, starts it once to hear which formats and schemes it has, and
pins its files. It runs the plugin's code with your rights, now and whenever lorakit
uses the plugin: install what you would run yourself.

A folder has a file plugin.json:

  {"name": "keras", "command": ["python3", "-I", "main.py"], "start_seconds": 20, "mtls": false}

The first word of the command is a program of the package, ./NAME, or one in PATH, which
is pinned as well. Packages that an interpreter loads from outside of the folder are not.

lorakit and a single executable show each other certificates (mutual TLS), which makes each
start some 25 ms longer, and 200 on a busy machine; a folder does so where plugin.json has
"mtls": true.`,
		Example: `  lorakit plugin install ./lorakit-flax
  lorakit plugin install ./keras-plugin --json`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			r, err := lorakit.InstallPlugin(c.Context(), args[0], o)
			if err != nil {
				return err
			}
			for _, n := range r.Notices {
				fmt.Fprintf(c.ErrOrStderr(), "note: %s\n", escape(n))
			}
			w := c.OutOrStdout()
			if asJSON {
				return printJSON(w, r)
			}
			fmt.Fprintf(w, "%s %s is installed in %s\n", r.Name, r.Version, escape(r.Path))
			if len(r.Formats) > 0 {
				fmt.Fprintf(w, "formats: %s\n", strings.Join(r.Formats, ", "))
			}
			if len(r.Schemes) > 0 {
				fmt.Fprintf(w, "quantisation types: %s\n", strings.Join(r.Schemes, ", "))
			}
			return nil
		},
	}
	c.Flags().BoolVar(&o.NoMTLS, "no-mtls", false, "start the plugin without mutual TLS: faster, and what guards "+
		"the connection then is that only you may use its socket")
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

func pluginRemoveCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:               "remove NAME",
		Short:             "Remove an installed plugin",
		Long:              `remove removes the plugin's files. A plugin that another lorakit is running stays.`,
		Example:           `  lorakit plugin remove flax`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completePlugin,
		RunE: func(c *cobra.Command, args []string) error {
			if err := lorakit.RemovePlugin(c.Context(), args[0]); err != nil {
				return err
			}
			w := c.OutOrStdout()
			if asJSON {
				return printJSON(w, struct {
					Name string `json:"name"`
				}{args[0]})
			}
			fmt.Fprintf(w, "%s is removed\n", escape(args[0]))
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

func pluginVerifyCommand() *cobra.Command {
	var asJSON bool
	var o lorakit.VerifyPluginOptions
	c := &cobra.Command{
		Use:   "verify NAME",
		Short: "Read a plugin's files and say which have changed since it was installed",
		Long: `verify reads all files of the plugin, and the interpreter that runs it. It exits with 3 if
any has changed, is missing or was added, or if this lorakit cannot use the plugin.

With --accept it pins the files as they are now.`,
		Example: `  lorakit plugin verify flax
  lorakit plugin verify --accept flax`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completePlugin,
		RunE: func(c *cobra.Command, args []string) error {
			r, err := lorakit.VerifyPlugin(c.Context(), args[0], o)
			if err != nil {
				return err
			}
			w := c.OutOrStdout()
			if asJSON {
				if err := printJSON(w, r); err != nil {
					return err
				}
			} else {
				for _, list := range []struct {
					what  string
					paths []string
				}{{"changed", r.Changed}, {"missing", r.Missing}, {"added", r.Added}} {
					for _, p := range list.paths {
						fmt.Fprintf(w, "%s: %s\n", list.what, escape(p))
					}
				}
				fmt.Fprintf(w, "%s: %s\n", r.Name, r.State)
			}
			if r.Err != nil {
				fmt.Fprintln(c.ErrOrStderr(), escape(withHints(r.Err)))
				return errFound
			}
			return nil
		},
	}
	c.Flags().BoolVar(&o.Accept, "accept", false, "pin the files as they are now")
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

// completePlugin completes the name of an installed plugin.
func completePlugin(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	r, err := lorakit.Plugins()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, p := range r.Plugins {
		names = append(names, p.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
