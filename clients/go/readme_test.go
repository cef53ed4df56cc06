package tokenbroker_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// goBlock returns the first Go code of a document.
func goBlock(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "```go\n")
	block, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatalf("%s has no code", path)
	}
	return block
}

func TestTheProgramOfTheReadmeSendsTheToken(t *testing.T) {
	defer startBrokerAndAPI()()
	program := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(program, []byte(goBlock(t, "README.md")), 0o600); err != nil {
		t.Fatal(err)
	}
	output, err := exec.Command("go", "run", program).CombinedOutput()
	if err != nil || string(output) != "200 OK\n" {
		t.Errorf("%v: %s", err, output)
	}
}

func TestTheLinesInTheDocumentsAreThoseOfTheProgram(t *testing.T) {
	const document = "../../docs/clients.md"
	if _, err := os.Stat(document); err != nil {
		t.Skip("the module is tested without the repository")
	}
	program := goBlock(t, "README.md")
	for _, line := range strings.Split(goBlock(t, document), "\n") {
		if !strings.Contains(program, strings.TrimSpace(line)) {
			t.Errorf("the program of the README does not have this line: %s", line)
		}
	}
}
