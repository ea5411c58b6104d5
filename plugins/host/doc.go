// Package host runs plugins: it starts their processes, speaks to them, and makes a formats.Format or a quant.Scheme of
// what they offer. What a plugin answers is a stranger's word and is checked as a file is.
//
// A plugin is started when it is first used, once for all that uses it at the same time, and is stopped when nothing
// does. What a process needs from the outside, it is given: a few variables of the environment, its own folder as the
// current one, a pipe that ends with this process.
package host
