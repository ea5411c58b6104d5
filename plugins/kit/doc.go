// Package kit checks that a format or a scheme does what lorakit relies on: that what is written is read back, that
// files which are broken are refused, that no process stays behind. The checks are made through the interfaces that
// lorakit itself uses, so that those which are built in have to pass them as plugins do.
//
// What a format cannot hold it has to refuse, by formats.ErrUnsupported, which a plugin answers as UNIMPLEMENTED: the
// check is skipped then. One that writes something else in its place fails.
package kit
