package tokenbroker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf16"
)

// pathNotShown is written in place of a path that may be a secret.
const pathNotShown = "(path not shown: nothing is there)"

// readFile returns the text of a file, without a byte order mark and as UTF-8. The error shows the path only if it
// cannot be a secret, and has no [fs.PathError] in it, which would.
func readFile(path string) ([]byte, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		var inPath *fs.PathError
		if errors.As(err, &inPath) {
			err = inPath.Err
		}
		return nil, fmt.Errorf("%s cannot be read: %w", shownPath(path), err)
	}
	return toUTF8(content), nil
}

// toUTF8 removes the byte order mark that the tools of Windows put at the beginning, and turns UTF-16 that begins with
// one into UTF-8.
func toUTF8(content []byte) []byte {
	var order binary.ByteOrder
	switch {
	case bytes.HasPrefix(content, []byte("\xef\xbb\xbf")):
		return content[3:]
	case bytes.HasPrefix(content, []byte("\xff\xfe")):
		order = binary.LittleEndian
	case bytes.HasPrefix(content, []byte("\xfe\xff")):
		order = binary.BigEndian
	default:
		return content
	}
	units := make([]uint16, 0, len(content)/2)
	for rest := content[2:]; len(rest) >= 2; rest = rest[2:] {
		units = append(units, order.Uint16(rest))
	}
	if len(content)%2 != 0 {
		units = append(units, unicode.ReplacementChar) // the last character was cut off
	}
	return []byte(string(utf16.Decode(units)))
}

// shownPath returns a path for an error or a log line: as it is if it exists or if its directory does, and otherwise a
// text that does not contain it. A frequent mistake is to give the content of a file, such as a bearer, instead of its
// path.
func shownPath(path string) string {
	if path == "" {
		return ""
	}
	if strings.ContainsFunc(path, unicode.IsControl) || strings.Contains(path, "://") {
		return pathNotShown
	}
	if _, err := os.Lstat(path); err == nil || isInDirectory(path) {
		return path
	}
	return pathNotShown
}

// isInDirectory reports whether the directory of a path exists. Neither base64 nor another key names one, except the
// root and the current one.
func isInDirectory(path string) bool {
	directory := filepath.Dir(path)
	if directory == "." && !strings.HasPrefix(path, "./") || directory == string(filepath.Separator) {
		return false
	}
	info, err := os.Stat(directory)
	return err == nil && info.IsDir()
}
