package pipeline

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"unicode/utf8"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

// maxCopied bounds the files that are copied along.
const maxCopied = 10_000

// filesToCopy lists the files of the folder that go along with the tensors as they are: tokenizer, generation config,
// licence, chat template. Files in written are made anew; weights in other formats would contradict the result, so
// they stay, and are returned in skipped.
func filesToCopy(ctx context.Context, dir storage.Folder, known *formats.Registry, written map[string]bool) (
	files []InputFile, skipped []string, err error) {
	folders := 0
	var walk func(below string) error
	walk = func(below string) error {
		entries, err := dir.List(ctx, below)
		if err != nil {
			return err
		}
		for _, e := range entries {
			name := path.Join(below, e.Name)
			switch {
			case e.Folder && (e.Name == ".git" || e.Name == ".cache"), !e.Folder && written[name]:
			case !utf8.ValidString(name) || strings.Contains(name, `\`), // no name on every system
				!e.Folder && known.IsWeights(name):
				skipped = append(skipped, name)
			case len(files) == maxCopied || folders == maxCopied:
				return fmt.Errorf("%s: %w: more than %d files", dir.Path(""), formats.ErrLimit, maxCopied)
			case e.Folder:
				folders++
				if err := walk(name); err != nil {
					return err
				}
			default:
				in, err := inputFileIn(ctx, dir, name)
				nowhere := e.Link && err != nil && !errors.Is(err, storage.ErrOutside) // as links of editors lead
				if nowhere || errors.Is(err, storage.ErrNotRegular) {                  // a link to a folder, a pipe, a socket
					skipped = append(skipped, name)
					continue
				}
				if err != nil {
					return err
				}
				files = append(files, in)
			}
		}
		return nil
	}
	err = walk("")
	return files, skipped, err
}
