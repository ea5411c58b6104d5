package pytorch

import (
	"io"
	"math/big"

	"github.com/lorakit/lorakit/tensor"
)

// What the first two pickles of an old file hold.
var (
	legacyNumber, _ = new(big.Int).SetString("1950a86a20f9469cfc6c", 16)
	legacyProtocol  = int64(1001)
)

// readLegacy reads a file from before PyTorch 1.6, of the given size. It returns what its fourth pickle has built and
// where each storage is.
func readLegacy(f io.ReaderAt, size int64, limits Limits) (root any, places map[string]span, err error) {
	at := int64(0)
	next := func() (any, *machine, error) {
		m := newMachine(newSource(f, at, min(size-at, limits.PickleBytes)), limits)
		v, err := m.load()
		if err != nil && m.in.left == 0 && size-at > limits.PickleBytes {
			err = limitf("found a pickle of more than %d bytes", limits.PickleBytes)
		}
		at = m.in.at
		return v, m, err
	}
	magic, _, err := next()
	if err != nil {
		return nil, nil, err
	}
	if n, ok := magic.(*big.Int); !ok || n.Cmp(legacyNumber) != 0 {
		return nil, nil, malformedf("found a pickle alone, expected a file of torch.save")
	}
	protocol, _, err := next()
	if err != nil {
		return nil, nil, err
	}
	if protocol != any(legacyProtocol) {
		return nil, nil, malformedf("found %s as the version of an old file, expected %d", show(protocol), legacyProtocol)
	}
	machineFacts, _, err := next()
	if err != nil {
		return nil, nil, err
	}
	facts, ok := machineFacts.(*dict)
	if !ok {
		return nil, nil, malformedf("found %s as the facts of the machine, expected a dict", kind(machineFacts))
	}
	for i, k := range facts.keys {
		if text(k) == "little_endian" && facts.values[i] != any(true) {
			return nil, nil, unsupportedf("found a file of a big-endian machine: save it again on a little-endian one")
		}
	}
	root, m, err := next()
	if err != nil {
		return nil, nil, err
	}
	list, _, err := next()
	if err != nil {
		return nil, nil, err
	}
	keys, ok := list.(*array)
	if !ok {
		return nil, nil, malformedf("found %s as the keys of the storages, expected a list", kind(list))
	}
	places = make(map[string]span, len(m.storages))
	for _, k := range keys.items {
		key := text(k)
		s, ok := m.storages[key]
		if !ok {
			return nil, nil, malformedf("found the storage %s, expected one that the pickle mentions", tensor.Quote(key))
		}
		if _, ok := places[key]; ok {
			return nil, nil, malformedf("storage %s: found it twice, expected it once", tensor.Quote(key))
		}
		var b [8]byte
		if size-at < int64(len(b)) {
			return nil, nil, malformedf("storage %s: found the end of the file, expected the number of its elements",
				tensor.Quote(key))
		}
		if err := readFull(f, b[:], at); err != nil {
			return nil, nil, err
		}
		at += int64(len(b))
		if n := le.Uint64(b[:]); n != uint64(s.count) {
			return nil, nil, malformedf("storage %s: found %d elements before the data, expected %d as in the pickle",
				tensor.Quote(key), n, s.count)
		}
		if s.bytes() > size-at {
			return nil, nil, malformedf("storage %s: found %d bytes to the end of the file, expected %d", tensor.Quote(key),
				size-at, s.bytes())
		}
		places[key] = span{at, s.bytes()}
		at += s.bytes()
	}
	if at != size {
		return nil, nil, malformedf("found %d bytes behind the last storage, expected none", size-at)
	}
	return root, places, nil
}
