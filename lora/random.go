package lora

// mersenne is the generator of random numbers that torch has on the CPU, MT19937 (Matsumoto and Nishimura, "Mersenne
// Twister", 1998).
type mersenne struct {
	state [624]uint32
	at    int
}

// newMersenne begins as torch's manual_seed does, which takes the low 32 bits of a seed.
func newMersenne(seed int64) *mersenne {
	g := &mersenne{at: 624}
	g.state[0] = uint32(seed)
	for i := 1; i < len(g.state); i++ {
		last := g.state[i-1]
		g.state[i] = 1812433253*(last^last>>30) + uint32(i)
	}
	return g
}

// bits32 draws 32 bits.
func (g *mersenne) bits32() uint32 {
	if n := len(g.state); g.at == n {
		const apart = 397
		for i := range n - apart {
			g.state[i] = mixed(g.state[i], g.state[i+1]) ^ g.state[i+apart]
		}
		for i := n - apart; i < n-1; i++ {
			g.state[i] = mixed(g.state[i], g.state[i+1]) ^ g.state[i+apart-n]
		}
		g.state[n-1] = mixed(g.state[n-1], g.state[0]) ^ g.state[apart-1]
		g.at = 0
	}
	x := g.state[g.at]
	g.at++
	x ^= x >> 11
	x ^= x << 7 & 0x9d2c5680
	x ^= x << 15 & 0xefc60000
	return x ^ x>>18
}

// mixed is the twist of a number by the one after it.
func mixed(x, next uint32) uint32 {
	y := x&0x80000000 | next&0x7fffffff
	return y>>1 ^ y&1*0x9908b0df
}

// bits64 draws 64 bits.
func (g *mersenne) bits64() uint64 {
	high := uint64(g.bits32())
	return high<<32 | uint64(g.bits32())
}

// permutation is the beginning of torch.randperm(n): its first k elements. It takes n steps for more than some 200
// million elements, else k.
func (g *mersenne) permutation(n, k int64) []int64 {
	k = min(n, k)
	first := make([]int64, k)
	if n >= 1<<32/20 { // each number is put into a random place, from which what was there goes to the end
		for i := range n {
			at := int64(g.bits64() % uint64(i+1))
			if i < k {
				first[i] = first[at]
			}
			if at < k {
				first[at] = i
			}
		}
		return first
	}
	moved := map[int64]int64{} // what stands where another number did
	at := func(i int64) int64 {
		if x, ok := moved[i]; ok {
			return x
		}
		return i
	}
	for i := range k { // each place gets one of those that are left
		if i == n-1 {
			first[i] = at(i)
			break
		}
		other := i + int64(g.bits32())%(n-i)
		first[i], moved[other] = at(other), at(i)
		delete(moved, i)
	}
	return first
}
