package e2e

import (
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"
)

// explained are the messages in the first cells of the tables of errors.md and logs.md, in the
// second ones of the table of faults.
func explained(t *testing.T) (messages []string) {
	for line := range strings.Lines(docsPage(t, "errors.md") + docsPage(t, "logs.md")) {
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		cells := strings.Split(line[2:], " | ")
		cell := cells[0]
		if len(cells) == 3 {
			cell = cells[1]
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
			messages = append(messages, m[1])
		}
	}
	return messages
}

// contains tells whether the parts of a message are in the text, in any order. An ellipsis stands for
// what differs from one time to the next.
func contains(text, message string) bool {
	for part := range strings.SplitSeq(message, "…") {
		if !strings.Contains(text, strings.TrimSpace(part)) {
			return false
		}
	}
	return true
}

// The messages that the pages explain are those of the code.
func TestReadmeMessages(t *testing.T) {
	source := source(t)
	messages := explained(t)
	for _, m := range messages {
		if !contains(source, m) {
			t.Errorf("a page explains the message %q, and no code says that", m)
		}
	}
	if len(messages) < 80 {
		t.Errorf("%d messages in the pages, want at least 80", len(messages))
	}
}

// The pages explain every warning and every error that the code logs.
func TestReadmeHasEachWarning(t *testing.T) {
	messages := explained(t)
	logged := 0
	for _, path := range sources(t) {
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			f, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains([]string{"Warning", "Warningf", "Error", "Errorf"}, f.Sel.Name) {
				return true
			}
			if of, ok := f.X.(*ast.Ident); !ok || of.Name != "log" {
				return true
			}
			literal, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				return true // made elsewhere
			}
			text, err := strconv.Unquote(literal.Value)
			if err != nil {
				t.Fatal(err)
			}
			logged++
			words := regexp.MustCompile(`%\w`).ReplaceAllString(text, "")
			if !strings.ContainsFunc(words, unicode.IsLetter) {
				return true // an error that is one of the table
			}
			if !slices.ContainsFunc(messages, func(m string) bool { return contains(text, m) }) {
				t.Errorf("%s: no page explains %q", files.Position(call.Pos()), text)
			}
			return true
		})
	}
	if logged < 20 {
		t.Errorf("%d warnings and errors found, want at least 20", logged)
	}
}
