package tokenbroker

import (
	"log/slog"
	"strings"
	"sync"
	"time"
)

// lookInterval is how often files are looked at.
const lookInterval = time.Second

// bearerFile has the bearer of a file, and reads it again.
type bearerFile struct {
	path   string // empty if the client has no bearer
	logger *slog.Logger

	mu      sync.Mutex
	bearer  string
	readAt  time.Time
	problem string // why the file could not be used when it was last read; logged once
}

// newBearerFile reads the file. It fails if there is no usable bearer in it.
func newBearerFile(path string, logger *slog.Logger) (*bearerFile, *Error) {
	f := &bearerFile{path: path, logger: logger}
	if path == "" {
		return f, nil
	}
	bearer, problem := readBearer(path)
	if problem != "" {
		return nil, invalid("the bearer's file cannot be used: %s", problem)
	}
	f.bearer, f.readAt = bearer, time.Now()
	return f, nil
}

// current returns the bearer, or "" if the client has none.
func (f *bearerFile) current() string {
	f.mu.Lock()
	due := f.path != "" && time.Since(f.readAt) > lookInterval
	f.mu.Unlock()
	if due {
		f.read()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bearer
}

// changedFrom reads the file at once, and reports whether it has another bearer than the given one.
func (f *bearerFile) changedFrom(used string) bool {
	if f.path == "" {
		return false
	}
	f.read()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bearer != used
}

// read keeps the old bearer if the file cannot be used, such as in the middle of a replacement.
func (f *bearerFile) read() {
	f.mu.Lock()
	f.readAt = time.Now()
	bearer, problem := readBearer(f.path)
	known := problem == f.problem
	f.problem = problem
	if problem == "" {
		f.bearer = bearer
	}
	f.mu.Unlock()
	if problem != "" && !known {
		f.logger.Warn("the bearer's file cannot be used, so the bearer read before stays in use", "problem", problem)
	}
}

// readBearer returns the bearer, or what is wrong with the file. The text never quotes the file's content.
func readBearer(path string) (bearer, problem string) {
	content, err := readFile(path)
	if err != nil {
		return "", err.Error()
	}
	bearer = strings.TrimSpace(string(content))
	if bearer == "" {
		return "", shownPath(path) + " is empty"
	}
	for _, c := range []byte(bearer) {
		if c <= ' ' || c > '~' {
			return "", shownPath(path) + " has a character that cannot be part of a bearer"
		}
	}
	return bearer, ""
}
