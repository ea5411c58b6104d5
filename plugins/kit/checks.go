package kit

import (
	"context"

	"github.com/lorakit/lorakit/tensor"
)

// check is something that is promised. One of the functions is set; each says what it has seen.
type check struct {
	id string
	// advice is what to do about a failure that does not say so itself.
	advice string
	format func(context.Context, *format) (string, error)
	scheme func(context.Context, *scheme) (string, error)
	plugin func(context.Context, *run) (string, error)
	// connected says that the check can be made without a process.
	connected bool
	// refuses says that the plugin is given what it has to refuse.
	refuses bool
}

// checks lists all checks, in the order in which they are made.
func checks() []check {
	list := []check{
		{id: "describe-matches", plugin: describeMatches, connected: true,
			advice: "answer Describe with the same name, version, capabilities, formats and schemes each time; a change " +
				"needs a new version, and to be installed again"},
		{id: "sniff-own", format: sniffOwn,
			advice: "describe the extensions, file names and magic bytes that the files have which are written"},
		{id: "sniff-foreign", format: sniffForeign, refuses: true,
			advice: "describe an extension, or longer magic bytes, and refuse other files by " + malformed + " in Open"},
	}
	for d := tensor.DType(1); d.Valid(); d++ {
		there := func(ctx context.Context, f *format) (string, error) { return roundtrip(ctx, f, d) }
		list = append(list, check{id: "roundtrip-" + d.String(), format: there,
			advice: "read " + d.String() + " back with the bytes, dtype and shape that were written, or refuse it by " +
				unsupported + " and leave it out of the dtypes that are described"})
	}
	return append(list, []check{
		{id: "shape-0d", format: shape0d,
			advice: "read a scalar back with no dimensions, or refuse it by " + unsupported},
		{id: "shape-empty", format: shapeEmpty,
			advice: "read tensors without elements back with all their dimensions, or refuse them by " + unsupported},
		{id: "shape-large-rank", format: shapeLargeRank,
			advice: "read back all dimensions, or refuse as many by " + unsupported},
		{id: "name-long", format: nameLong,
			advice: "keep a name of 64 KiB whole, or refuse it by " + unsupported + "; never cut it"},
		{id: "name-non-ascii", format: nameNonASCII,
			advice: "keep the bytes of names in UTF-8, without normalisation, or refuse them by " + unsupported},
		{id: "name-slash", format: nameSlash,
			advice: "keep slashes in names as they are: a name is no path of a file system; or refuse them by " +
				unsupported},
		{id: "tensors-10000", format: tensors10000,
			advice: "list all tensors, in batches of at most 1 MiB, each once"},
		{id: "order", format: order,
			advice: "list the tensors in the order in which their data lies in the file, the same each time"},
		{id: "range-odd", format: rangeOdd,
			advice: "answer Read with exactly the bytes [offset, offset + length), at any offset and length"},
		{id: "range-whole", format: rangeWhole,
			advice: "answer Read of a whole tensor with all its bytes, in order, in chunks of at most 1 MiB"},
		{id: "range-concurrent", format: rangeConcurrent,
			advice: "several Reads of one handle go on at once: read by position (pread, ReadAt) or take a lock, and " +
				"share no buffer between calls"},
		{id: "read-cancel", format: readCancel,
			advice: "end a Read when its context is cancelled, and hold no lock while data is sent"},
		{id: "write-abort", format: writeAbort,
			advice: "Abort removes the file, whatever has been written of it, closes what is open, and may be called " +
				"again"},
		{id: "write-twice-same-bytes", format: writeTwice,
			advice: "leave out times, random ids and the order of hash maps: the same tensors become the same bytes"},
		{id: "write-only-its-path", format: writeOnlyItsPath,
			advice: "write the path that Create gives and nothing else: no file beside it, and nothing in the plugin's " +
				"folder"},
		{id: "bad-truncated", format: badTruncated, refuses: true,
			advice: "check each offset and length against the size of the file, and refuse one that is cut short by " +
				malformed},
		{id: "bad-bitflip", format: badBitflip, refuses: true,
			advice: "take nothing in a file for granted: refuse what cannot be by " + malformed},
		{id: "bad-huge-count", format: badHugeCount, refuses: true,
			advice: "check a count against the size of the file before memory is made for it, and refuse one that is " +
				"too large by " + limit + " or " + malformed},
		{id: "scheme-roundtrip", scheme: schemeRoundtrip,
			advice: "Decode what Encode and Finish have stored to values near those that were given, for all shapes " +
				"that Encoder takes; it refuses others by " + unsupportedWeight},
		{id: "scheme-tiles-any-split", scheme: schemeTiles,
			advice: "let a tile depend on its own elements alone: state a unit at whose multiples a weight may be " +
				"split, and keep nothing from one tile to the next"},
		{id: "scheme-bad", scheme: schemeBad, refuses: true,
			advice: "check dtype, shape and content of each part in Find, and refuse those that contradict each other " +
				"by " + malformedWeight},
		{id: "memory-flat", plugin: memoryFlat,
			advice: "give up in Close what Open has taken, and read and write data chunk by chunk"},
		{id: "stdout-quiet", plugin: stdoutQuiet,
			advice: "print to stderr: stdout is the handshake's alone. The SDKs point it to stderr when they are " +
				"loaded: load them first"},
		{id: "exit-with-host", plugin: exitWithHost,
			advice: "read the descriptor that LORAKIT_PLUGIN_HOST_FD names, in a thread, and end the process and its " +
				"children at its end, as the SDKs do"},
		{id: "exit-in-3s", plugin: exitIn3s,
			advice: "serve Shutdown of go-plugin's GRPCController and end the process then, with all that it has started"},
	}...)
}
