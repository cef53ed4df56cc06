package tokenbroker_test

import (
	"os"
	"testing"
)

func TestTheReadmeShowsTheTestedExample(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	if !readmeShows(string(readme), string(source)) {
		t.Error("the code of the README is not in example_test.go")
	}
}
