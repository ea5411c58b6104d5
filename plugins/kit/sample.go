package kit

import (
	"hash/fnv"
	"math/rand/v2"

	"github.com/lorakit/lorakit/tensor"
)

// sample is a tensor with its data.
type sample struct {
	tensor.Info
	data []byte
}

// newSample makes a tensor whose data depends on its name alone. Its size is a whole number of bytes.
func newSample(name string, d tensor.DType, shape ...int64) sample {
	s := sample{Info: tensor.Info{Name: name, DType: d, Shape: append(tensor.Shape{}, shape...)}}
	size, err := s.Size()
	if err != nil {
		panic(err) // the kit's own tensors
	}
	s.data = make([]byte, size)
	h := fnv.New64a()
	h.Write([]byte(name))
	fill(s.data, h.Sum64())
	if d == tensor.Bool {
		for i := range s.data {
			s.data[i] &= 1
		}
	}
	return s
}

// fill makes random bytes.
func fill(p []byte, seed uint64) {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	_, _ = rand.NewChaCha8(key).Read(p) // it never fails
}

// source makes random numbers that are the same each time.
func source(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 21)) }

func infos(list []sample) []tensor.Info {
	all := make([]tensor.Info, len(list))
	for i, s := range list {
		all[i] = s.Info
	}
	return all
}
