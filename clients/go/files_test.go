package tokenbroker

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"
)

// encodings are those in which people write files: the name, and how a text is written.
var encodings = map[string]func(string) []byte{
	"UTF-8":                func(text string) []byte { return []byte(text) },
	"UTF-8 with a mark":    func(text string) []byte { return []byte("\ufeff" + text) },
	"UTF-16 little endian": func(text string) []byte { return inUTF16(text, 0) },
	"UTF-16 big endian":    func(text string) []byte { return inUTF16(text, 1) },
}

func inUTF16(text string, low int) []byte {
	var content []byte
	for _, unit := range utf16.Encode([]rune("\ufeff" + text)) {
		pair := [2]byte{}
		pair[low], pair[1-low] = byte(unit), byte(unit>>8)
		content = append(content, pair[:]...)
	}
	return content
}

func TestFilesAreReadInEveryEncodingWithAMark(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t)
	cert, key := ca.issue(t, "caller")
	for name, encode := range encodings {
		bearer, problem := readBearer(write(t, dir, "bearer", encode("tbk_x\r\n")))
		if bearer != "tbk_x" || problem != "" {
			t.Errorf("%s: %q, %s", name, bearer, problem)
		}
		files := certificateFiles{
			ca:   write(t, dir, "ca", encode(string(ca.pem))),
			cert: write(t, dir, "cert", encode(string(cert))),
			key:  write(t, dir, "key", encode(string(keyPEM(t, key)))),
		}
		if _, _, err := files.read(); err != nil {
			t.Errorf("%s: %s", name, err)
		}
	}
	for _, malformed := range []string{"\xff\xfet", "\xff\xfe\x00\xd8", "\xff\xfe\x00\x00t\x00\x00\x00", "t\x00b\x00"} {
		if _, problem := readBearer(write(t, dir, "bearer", []byte(malformed))); problem == "" {
			t.Errorf("%q is read as a bearer", malformed)
		}
	}
}

func TestASecretThatIsGivenInsteadOfAPathIsNotQuoted(t *testing.T) {
	bearer := write(t, t.TempDir(), "bearer", []byte("tbk_x"))
	pem := "-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----\n"
	for _, secret := range []string{
		"tbk_canary", "can/ary", `can\nary`, "/canary", "//canary", "///canary", "/canary/canary", "canary\x00",
		"/etc/canary\n", bearer + "/canary", pem, "canary/" + strings.Repeat("x", 300) + "/y", "https://canary",
	} {
		for setting, config := range map[string]Config{
			"BearerFile":     {Endpoints: []string{"https://localhost:1"}, BearerFile: secret},
			"CAFile":         {Endpoints: []string{"https://localhost:1"}, CAFile: secret},
			"ClientCertFile": {Endpoints: []string{"https://localhost:1"}, ClientCertFile: secret, ClientKeyFile: bearer},
			"ClientKeyFile":  {Endpoints: []string{"https://localhost:1"}, ClientCertFile: bearer, ClientKeyFile: secret},
		} {
			_, err := New(config)
			if !errors.Is(err, ErrInvalidArgument) {
				t.Errorf("%s: %v", setting, err)
			}
			text := fmt.Sprintf("%v %v %+v %#v %s", config, &config, config, config, config)
			for ; err != nil; err = errors.Unwrap(err) {
				text += fmt.Sprintf("\n%v %+v %#v", err, err, err)
			}
			for _, value := range []any{config, &config, map[string]any{"config": config}} {
				inJSON, err := json.Marshal(value)
				if err != nil {
					t.Fatal(err)
				}
				text += "\n" + string(inJSON)
			}
			for _, part := range []string{"canary", "can/ary", `can\`, "BEGIN"} {
				if strings.Contains(text, part) {
					t.Errorf("%s: %s", setting, text)
				}
			}
		}
	}
}

func TestTheJSONOfAConfigIsItsText(t *testing.T) {
	config := Config{Endpoints: []string{"https://user:canary@localhost:1"}, BearerFile: "files_test.go"}
	inJSON, err := json.Marshal(config)
	var text string
	if err != nil || json.Unmarshal(inJSON, &text) != nil || text != config.String() || strings.Contains(text, "canary") {
		t.Errorf("%s, %v", inJSON, err)
	}
}

func TestAPathIsShownIfItOrItsDirectoryExists(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{dir, filepath.Join(dir, "missing"), "./missing", "files_test.go"} {
		if shown := shownPath(path); shown != path {
			t.Errorf("%s is shown as %s", path, shown)
		}
	}
	if _, err := readFile(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), dir) {
		t.Error(err)
	}
}
