package msgpack

import "strings"

// Join makes the name of a tensor of the keys that lead to it. They are joined by slashes, as flax and transformers do.
// A slash in a key becomes \/, and backslashes before a slash, of either kind, are doubled; all others stay as
// they are. So there is exactly one name for each list of one key or more, and the other way round.
func Join(path []string) string {
	if len(path) == 1 && !strings.Contains(path[0], "/") {
		return path[0]
	}
	var b strings.Builder
	for i, key := range path {
		slashes := 0 // backslashes that precede
		for k := range len(key) {
			switch key[k] {
			case '\\':
				slashes++
			case '/':
				b.WriteString(strings.Repeat(`\`, slashes+1))
				slashes = 0
			default:
				slashes = 0
			}
			b.WriteByte(key[k])
		}
		if i < len(path)-1 {
			b.WriteString(strings.Repeat(`\`, slashes))
			b.WriteByte('/')
		}
	}
	return b.String()
}

// Split returns the keys that Join has made a name of.
func Split(name string) []string {
	var path []string
	var key strings.Builder
	slashes := 0
	for i := range len(name) {
		switch c := name[i]; {
		case c == '\\':
			slashes++
			continue
		case c != '/':
			key.WriteString(strings.Repeat(`\`, slashes))
			key.WriteByte(c)
		case slashes%2 == 1:
			key.WriteString(strings.Repeat(`\`, slashes/2))
			key.WriteByte(c)
		default:
			key.WriteString(strings.Repeat(`\`, slashes/2))
			path = append(path, key.String())
			key.Reset()
		}
		slashes = 0
	}
	key.WriteString(strings.Repeat(`\`, slashes))
	return append(path, key.String())
}
