package pytorch

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// The records of a zip archive (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT). The standard library's
// reader does not say where an entry's header stands, so entries could not be held against each other; and it takes
// memory as the directory says.
const (
	localMagic      = 0x04034b50
	centralMagic    = 0x02014b50
	endMagic        = 0x06054b50
	end64Magic      = 0x06064b50
	locatorMagic    = 0x07064b50
	descriptorMagic = 0x08074b50

	localBytes   = 30
	centralBytes = 46
	endBytes     = 22
	end64Bytes   = 56
	locatorBytes = 20
	maxComment   = math.MaxUint16

	flagEncrypted  = 1<<0 | 1<<6 | 1<<13
	flagDescriptor = 1 << 3 // sizes stand behind the data
	flagUTF8       = 1 << 11
	zip64Extra     = 1
	in64           = math.MaxUint32 // a number that stands in the zip64 field
)

// span is a range of a file's bytes.
type span struct{ offset, bytes int64 }

func (s span) end() int64 { return s.offset + s.bytes }

// archive is the directory of a zip file: where the data of each entry is, by its name below the folder that all of
// them are in.
type archive map[string]span

// entry is what the directory says of one entry.
type entry struct {
	name   string
	flags  uint16
	header int64
	bytes  int64
}

// readArchive reads the directory of a zip file of the given size and the header of each entry. They must agree, and
// no two entries may share a name or a byte: else two readers could see two different files.
func readArchive(f io.ReaderAt, size int64, limits Limits) (archive, error) {
	directory, count, err := readEnd(f, size, limits)
	if err != nil {
		return nil, err
	}
	b := make([]byte, directory.bytes)
	if err := readFull(f, b, directory.offset); err != nil {
		return nil, err
	}
	entries := make([]entry, 0, count)
	for range count {
		var e entry
		if e, b, err = readCentral(b); err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	if len(b) != 0 {
		return nil, malformedf("found %d bytes behind the %d entries of the zip directory, expected none", len(b), count)
	}
	slices.SortStableFunc(entries, func(a, b entry) int { return cmp.Compare(a.header, b.header) })

	a := make(archive, len(entries))
	root := ""
	at := int64(0)
	for _, e := range entries {
		if e.header < at {
			return nil, entryErrorf(e, "found its header at byte %d, expected it from %d: it overlaps the entry before it",
				e.header, at)
		}
		data, err := readLocal(f, e, directory.offset)
		if err != nil {
			return nil, err
		}
		at = data.end()
		folder, name, ok := strings.Cut(e.name, "/")
		if root == "" {
			root = folder
		}
		if !ok || folder == "" || folder != root {
			return nil, entryErrorf(e, "found it outside of the folder %s, expected all entries in one folder as PyTorch "+
				"writes them", tensor.Quote(root))
		}
		if _, ok := a[name]; ok {
			return nil, entryErrorf(e, "found it twice, expected it once")
		}
		a[name] = data
	}
	return a, nil
}

func entryErrorf(e entry, format string, args ...any) error {
	return malformedf("zip entry %s: "+format, append([]any{tensor.Quote(e.name)}, args...)...)
}

// readEnd finds the directory by the record at the end of the file.
func readEnd(f io.ReaderAt, size int64, limits Limits) (directory span, count int64, err error) {
	b := make([]byte, min(size, locatorBytes+endBytes+maxComment))
	start := size - int64(len(b))
	if err := readFull(f, b, start); err != nil {
		return span{}, 0, err
	}
	at := len(b) - endBytes
	for ; at >= 0; at-- {
		if le.Uint32(b[at:]) == endMagic && int(le.Uint16(b[at+20:])) == len(b)-at-endBytes {
			break
		}
	}
	if at < 0 {
		return span{}, 0, malformedf("found no end of a zip archive, expected one: the file may be cut short")
	}
	end := b[at:]
	disks := uint64(le.Uint16(end[4:])) | uint64(le.Uint16(end[6:]))
	here, total := uint64(le.Uint16(end[8:])), uint64(le.Uint16(end[10:]))
	bytes, offset := uint64(le.Uint32(end[12:])), uint64(le.Uint32(end[16:]))
	position := start + int64(at)
	if at >= locatorBytes && le.Uint32(b[at-locatorBytes:]) == locatorMagic {
		locator := b[at-locatorBytes:]
		where := le.Uint64(locator[8:])
		if limit := position - locatorBytes - end64Bytes; limit < 0 || where != uint64(limit) {
			return span{}, 0, malformedf("found the zip64 end of the archive at byte %d, expected it at %d", where, limit)
		}
		var e [end64Bytes]byte
		if err := readFull(f, e[:], int64(where)); err != nil {
			return span{}, 0, err
		}
		if le.Uint32(e[:]) != end64Magic || le.Uint64(e[4:]) != end64Bytes-12 {
			return span{}, 0, malformedf("found no zip64 end of the archive at byte %d, expected one", where)
		}
		disks = uint64(le.Uint32(e[16:]) | le.Uint32(e[20:]))
		if n := le.Uint32(locator[16:]); n != 1 {
			disks = 1
		}
		// What the short record says too must agree.
		for _, x := range []struct{ short, top, long uint64 }{
			{here, math.MaxUint16, le.Uint64(e[24:])},
			{total, math.MaxUint16, le.Uint64(e[32:])},
			{bytes, math.MaxUint32, le.Uint64(e[40:])},
			{offset, math.MaxUint32, le.Uint64(e[48:])},
		} {
			if x.short != x.top && x.short != x.long {
				return span{}, 0, malformedf("found %d in the end of the zip archive and %d in its zip64 end, expected the same",
					x.short, x.long)
			}
		}
		here, total, bytes, offset = le.Uint64(e[24:]), le.Uint64(e[32:]), le.Uint64(e[40:]), le.Uint64(e[48:])
		position = int64(where)
	}
	switch {
	case disks != 0 || here != total:
		return span{}, 0, unsupportedf("found a zip archive of several disks, expected one")
	case bytes > uint64(position) || offset != uint64(position)-bytes:
		return span{}, 0, malformedf("found a zip directory of %d bytes at byte %d, expected one that ends at %d", bytes,
			offset, position)
	case total > uint64(limits.Entries):
		return span{}, 0, limitf("found %d zip entries, expected at most %d", total, limits.Entries)
	case bytes > uint64(limits.DirectoryBytes):
		return span{}, 0, limitf("found a zip directory of %d bytes, expected at most %d", bytes, limits.DirectoryBytes)
	case total > bytes/centralBytes:
		return span{}, 0, malformedf("found %d zip entries in a directory of %d bytes, expected %d bytes for each", total,
			bytes, centralBytes)
	}
	return span{int64(offset), int64(bytes)}, int64(total), nil
}

// readCentral reads the next entry of the directory and returns what follows it.
func readCentral(b []byte) (entry, []byte, error) {
	if len(b) < centralBytes || le.Uint32(b) != centralMagic {
		return entry{}, nil, malformedf("found no entry in the zip directory, expected one more")
	}
	names, extras, comments := int(le.Uint16(b[28:])), int(le.Uint16(b[30:])), int(le.Uint16(b[32:]))
	if len(b)-centralBytes < names+extras+comments {
		return entry{}, nil, malformedf("found a zip entry of %d bytes, expected one that fits the directory",
			centralBytes+names+extras+comments)
	}
	rest := b[centralBytes:]
	e := entry{name: string(rest[:names]), flags: le.Uint16(b[8:])}
	method := le.Uint16(b[10:])
	packed, size, header := uint64(le.Uint32(b[20:])), uint64(le.Uint32(b[24:])), uint64(le.Uint32(b[42:]))
	if err := fromZip64(rest[names:names+extras], &size, &packed, &header); err != nil {
		return entry{}, nil, entryErrorf(e, "%v", err)
	}
	switch {
	case e.flags&flagEncrypted != 0:
		return entry{}, nil, unsupportedf("zip entry %s: found it encrypted, expected plain bytes", tensor.Quote(e.name))
	case method != 0 && strings.Contains(e.name, "/code/"):
		return entry{}, nil, errProgram
	case method != 0:
		return entry{}, nil, unsupportedf("zip entry %s: found it compressed (method %d), expected it stored: save it again "+
			"with torch.save", tensor.Quote(e.name), method)
	case le.Uint16(b[34:]) != 0:
		return entry{}, nil, unsupportedf("zip entry %s: found it on another disk", tensor.Quote(e.name))
	case packed != size:
		return entry{}, nil, entryErrorf(e, "found %d bytes stored as %d, expected the same", size, packed)
	case size > math.MaxInt64 || header > math.MaxInt64:
		return entry{}, nil, entryErrorf(e, "found %d bytes behind a header at byte %d, expected less than 2^63", size,
			header)
	}
	e.bytes, e.header = int64(size), int64(header)
	return e, rest[names+extras+comments:], nil
}

// readLocal reads the header before an entry's data and holds it against the directory. The data ends before limit.
func readLocal(f io.ReaderAt, e entry, limit int64) (span, error) {
	if e.header > limit-localBytes-int64(len(e.name)) {
		return span{}, entryErrorf(e, "found its header at byte %d, expected it before the directory at %d", e.header, limit)
	}
	b := make([]byte, localBytes+len(e.name))
	if err := readFull(f, b, e.header); err != nil {
		return span{}, err
	}
	names, extras := int64(le.Uint16(b[26:])), int64(le.Uint16(b[28:]))
	switch {
	case le.Uint32(b) != localMagic:
		return span{}, entryErrorf(e, "found no header at byte %d, expected one", e.header)
	case string(b[localBytes:]) != e.name || names != int64(len(e.name)):
		return span{}, entryErrorf(e, "found another name in its header at byte %d, expected the directory's", e.header)
	case le.Uint16(b[6:]) != e.flags || le.Uint16(b[8:]) != 0:
		return span{}, entryErrorf(e, "found other flags or another method in its header than in the directory, expected "+
			"the same")
	}
	data := span{e.header + localBytes + names + extras, e.bytes}
	if data.offset > limit || data.bytes > limit-data.offset {
		return span{}, entryErrorf(e, "found %d bytes at byte %d, expected an end before the directory at %d", data.bytes,
			data.offset, limit)
	}
	packed, size := uint64(le.Uint32(b[18:])), uint64(le.Uint32(b[22:]))
	if packed == in64 || size == in64 {
		extra := make([]byte, extras)
		if err := readFull(f, extra, data.offset-extras); err != nil {
			return span{}, err
		}
		if err := fromZip64(extra, &size, &packed); err != nil {
			return span{}, entryErrorf(e, "%v", err)
		}
	}
	for _, n := range []uint64{packed, size} {
		if n != uint64(e.bytes) && (n != 0 || e.flags&flagDescriptor == 0) {
			return span{}, entryErrorf(e, "found a size of %d bytes in its header, expected %d as in the directory", n, e.bytes)
		}
	}
	return data, nil
}

// fromZip64 replaces the numbers that stand in an entry's zip64 field, in its order.
func fromZip64(extra []byte, numbers ...*uint64) error {
	for len(extra) >= 4 {
		id, n := le.Uint16(extra), int(le.Uint16(extra[2:]))
		extra = extra[4:]
		if n > len(extra) {
			break
		}
		if id != zip64Extra {
			extra = extra[n:]
			continue
		}
		field := extra[:n]
		for _, x := range numbers {
			if *x != in64 {
				continue
			}
			if len(field) < 8 {
				return errors.New("found a short zip64 field, expected one with all sizes")
			}
			*x, field = le.Uint64(field), field[8:]
		}
		return nil
	}
	for _, x := range numbers {
		if *x == in64 {
			return errors.New("found no zip64 field, expected one")
		}
	}
	return nil
}

var le = binary.LittleEndian

// readFull fills p from the file. A file that ends early is an io.ErrUnexpectedEOF.
func readFull(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || err == io.EOF:
		return io.ErrUnexpectedEOF
	}
	return err
}

// small returns the content of a short entry, without white space around it.
func (a archive) small(f io.ReaderAt, name string) (string, bool, error) {
	s, ok := a[name]
	if !ok || s.bytes > 16 {
		return "", ok, nil
	}
	b := make([]byte, s.bytes)
	err := readFull(f, b, s.offset)
	return string(bytes.TrimSpace(b)), true, err
}
