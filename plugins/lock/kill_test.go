package lock

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// installing makes the test binary install versions of a plugin, one after the other, until it is killed. It has the
// paths of the folder and of the package.
const installing = "LORAKIT_TEST_INSTALLING"

func TestMain(m *testing.M) {
	if what := os.Getenv(installing); what != "" {
		dir, from, _ := strings.Cut(what, "\n")
		fmt.Println(install(dir, from))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func install(dir, from string) error {
	f, err := Open(dir, BuiltIn())
	for i := 0; err == nil; i++ {
		d := toy()
		d.Version = fmt.Sprint(i % 3)
		_, err = f.Install(context.Background(), from, says(d), InstallOptions{})
		if i == 0 {
			fmt.Println("begun")
		}
	}
	return err
}

// TestKill kills installs at random moments: a whole version is there, and the next install works and tidies up.
func TestKill(t *testing.T) {
	dir, from := filepath.Join(t.TempDir(), "plugins"), packed(t)
	for range 15 {
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), installing+"="+dir+"\n"+from)
		out, err := c.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, c.Start())
		line := make([]byte, 6)
		_, err = out.Read(line)
		require.NoError(t, err)
		require.Equal(t, "begun\n", string(line))
		time.Sleep(rand.N(10 * time.Millisecond))
		require.NoError(t, c.Process.Kill())
		require.Error(t, c.Wait())

		f := open(t, dir)
		require.Len(t, f.Plugins(), 1)
		r, err := f.Verify(f.Plugins()[0])
		require.NoError(t, err)
		require.Equal(t, OK, r.State(), "%v", r)
	}
	d := toy()
	d.Version = "3"
	f := open(t, dir)
	_, err := f.Install(t.Context(), from, says(d), InstallOptions{})
	require.NoError(t, err)
	clean(t, f)
	versions, err := os.ReadDir(filepath.Join(dir, "toy"))
	require.NoError(t, err)
	require.Len(t, versions, 1)
}
