package lorakit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/report"
	"github.com/lorakit/lorakit/storage"
)

// checkFile refuses a file that may not be written, before any work is done.
func checkFile(src, file string, force bool) error {
	if err := pipeline.CheckDestination(src, file, pipeline.RunOptions{Force: force}); err != nil {
		return err
	}
	if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %w: it is no file that could be replaced", file, ErrRefused)
	}
	if info, err := os.Stat(filepath.Dir(file)); err != nil || !info.IsDir() {
		return fmt.Errorf("%s: %w: there is no folder %s", file, ErrRefused, filepath.Dir(file))
	}
	return nil
}

// writePage writes a page, which appears whole or not at all.
func writePage(p *report.Page, file string, force bool) error {
	page, err := p.HTML()
	if err != nil {
		return err
	}
	err = storage.WriteWhole(file, page, force)
	if errors.Is(err, fs.ErrExist) && !force {
		return hint.With(fmt.Errorf("%s: %w", file, ErrExists), hint.Hint{Option: "Force", Effect: "replaces it"})
	}
	return err
}
