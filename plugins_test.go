package lorakit_test

import (
	"os"
	"testing"

	"github.com/lorakit/lorakit/plugins/lock"
)

// TestMain keeps the tests to what is built in: whoever runs them may have plugins.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "lorakit-plugins")
	if err == nil {
		err = os.Setenv(lock.Environment, dir)
	}
	if err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}
