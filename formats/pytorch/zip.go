package pytorch

import (
	"hash/crc32"
	"math"
	"slices"

	"github.com/lorakit/lorakit/formats"
)

// dataAlignment is what PyTorch aligns the data of each entry to, so that a storage can be mapped into memory.
const dataAlignment = 64

// zipFrame lays out a zip archive as PyTorch's writer does: entries are stored, a field of padding aligns the data,
// the sizes and the CRC-32 stand in a descriptor behind the data and in the directory, but for an entry without data.
type zipFrame struct {
	folder    string
	from      int64  // where b begins in the file
	b         []byte // what follows the data of the last entry that was reserved
	frame     formats.Frame
	entries   int
	directory []byte
	inDir     []int // for each checksum its place in the directory
}

func newZip(folder string) *zipFrame { return &zipFrame{folder: folder} }

// at is where the next byte goes.
func (z *zipFrame) at() int64 { return z.from + int64(len(z.b)) }

// add puts in an entry with its content.
func (z *zipFrame) add(name string, content []byte) {
	at := z.at()
	z.begin(name, int64(len(content)))
	z.b = append(z.b, content...)
	z.end(name, at, int64(len(content)), crc32.ChecksumIEEE(content))
}

// reserve makes room for an entry whose content comes later, and returns where it goes.
func (z *zipFrame) reserve(name string, size int64) int64 {
	at := z.at()
	z.begin(name, size)
	data := z.at()
	if size > 0 {
		z.cut()
		z.from += size
		z.frame.Checksums = append(z.frame.Checksums, formats.Checksum{Offset: data, Bytes: size, At: []int64{z.at() + 4}})
		z.inDir = append(z.inDir, len(z.directory)+16)
	}
	z.end(name, at, size, 0)
	return data
}

// cut ends the piece that is being filled.
func (z *zipFrame) cut() {
	if z.from == 0 {
		z.frame.Header = z.b
	} else {
		z.frame.Pieces = append(z.frame.Pieces, formats.Piece{Offset: z.from, Bytes: z.b})
	}
	z.from, z.b = z.at(), nil
}

// zip64 lists what of an entry does not fit 32 bits.
func zip64(at, size int64) []uint64 {
	var long []uint64
	if size >= in64 {
		long = append(long, uint64(size), uint64(size))
	}
	if at >= in64 {
		long = append(long, uint64(at))
	}
	return long
}

// appendZip64 appends the field of them. The standard wants no offset in a header before the data; PyTorch writes it,
// and readers go by the directory.
func appendZip64(b []byte, long []uint64) []byte {
	if len(long) == 0 {
		return b
	}
	b = le.AppendUint16(b, zip64Extra)
	b = le.AppendUint16(b, uint16(8*len(long)))
	for _, x := range long {
		b = le.AppendUint64(b, x)
	}
	return b
}

// flags says that names are in UTF-8, and that sizes stand behind the data where there is some.
func flags(size int64) uint16 {
	if size == 0 {
		return flagUTF8
	}
	return flagUTF8 | flagDescriptor
}

// begin writes the header before an entry's data.
func (z *zipFrame) begin(name string, size int64) {
	name = z.folder + "/" + name
	long := zip64(z.at(), size)
	if size >= in64 {
		long[1] = 0 // the compressed size, which PyTorch does not know here
	}
	extra := appendZip64(nil, long)
	data := z.at() + int64(localBytes+len(name)+len(extra)+4)
	padding := int(-data & (dataAlignment - 1))
	extra = append(extra, 'F', 'B', byte(padding), 0)
	extra = append(extra, slices.Repeat([]byte{'Z'}, padding)...)

	z.b = le.AppendUint32(z.b, localMagic)
	z.b = le.AppendUint16(z.b, 0) // version
	z.b = le.AppendUint16(z.b, flags(size))
	z.b = append(z.b, make([]byte, 2+2+2+4+4+4)...) // method, time, date, CRC, sizes
	z.b = le.AppendUint16(z.b, uint16(len(name)))
	z.b = le.AppendUint16(z.b, uint16(len(extra)))
	z.b = append(z.b, name...)
	z.b = append(z.b, extra...)
}

// end writes what follows the data of an entry whose header is at the given byte, and its record in the directory.
func (z *zipFrame) end(name string, at, size int64, crc uint32) {
	name = z.folder + "/" + name
	long := zip64(at, size)
	if size > 0 {
		z.b = le.AppendUint32(z.b, descriptorMagic)
		z.b = le.AppendUint32(z.b, crc)
		for range 2 {
			if len(long) > 0 {
				z.b = le.AppendUint64(z.b, uint64(size))
			} else {
				z.b = le.AppendUint32(z.b, uint32(size))
			}
		}
	}
	extra := appendZip64(nil, long)
	d := le.AppendUint32(z.directory, centralMagic)
	d = append(d, 0, 0, 0, 0) // versions
	d = le.AppendUint16(d, flags(size))
	d = append(d, make([]byte, 2+2+2)...) // method, time, date
	d = le.AppendUint32(d, crc)
	d = le.AppendUint32(d, uint32(min(size, in64)))
	d = le.AppendUint32(d, uint32(min(size, in64)))
	d = le.AppendUint16(d, uint16(len(name)))
	d = le.AppendUint16(d, uint16(len(extra)))
	d = append(d, make([]byte, 2+2+2+4)...) // comment, disk, attributes
	d = le.AppendUint32(d, uint32(min(at, in64)))
	d = append(d, name...)
	z.directory = append(d, extra...)
	z.entries++
}

// close writes the directory. It returns the frame of the file and its size.
func (z *zipFrame) close() (formats.Frame, int64) {
	start, length, count := z.at(), int64(len(z.directory)), z.entries
	z.b = append(z.b, z.directory...)
	for i, place := range z.inDir {
		c := &z.frame.Checksums[i]
		c.At = append(c.At, start+int64(place))
	}

	end64 := z.at()
	z.b = le.AppendUint32(z.b, end64Magic)
	z.b = le.AppendUint64(z.b, end64Bytes-12)
	z.b = le.AppendUint16(z.b, 3<<8|30) // made by version 3.0, on Unix
	z.b = le.AppendUint16(z.b, 45)      // needs 4.5, which has this record
	z.b = append(z.b, make([]byte, 4+4)...)
	z.b = le.AppendUint64(z.b, uint64(count))
	z.b = le.AppendUint64(z.b, uint64(count))
	z.b = le.AppendUint64(z.b, uint64(length))
	z.b = le.AppendUint64(z.b, uint64(start))

	z.b = le.AppendUint32(z.b, locatorMagic)
	z.b = le.AppendUint32(z.b, 0)
	z.b = le.AppendUint64(z.b, uint64(end64))
	z.b = le.AppendUint32(z.b, 1)

	z.b = le.AppendUint32(z.b, endMagic)
	z.b = append(z.b, make([]byte, 2+2)...)
	z.b = le.AppendUint16(z.b, uint16(min(count, math.MaxUint16)))
	z.b = le.AppendUint16(z.b, uint16(min(count, math.MaxUint16)))
	z.b = le.AppendUint32(z.b, uint32(min(length, in64)))
	z.b = le.AppendUint32(z.b, uint32(min(start, in64)))
	z.b = le.AppendUint16(z.b, 0)
	z.cut()
	return z.frame, z.from
}
