package e2e

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every promise at the head of nodecache.go and in the README's table has a row in
// docs/proof.md, and what a row names exists.
func TestPagesProof(t *testing.T) {
	page := docsPage(t, "proof.md")
	rows := map[string]string{} // what shows it, by promise
	for _, m := range regexp.MustCompile(`(?m)^\| (.+?) \| (.+?) \| .+ \|$`).FindAllStringSubmatch(page, -1) {
		rows[m[1]] = m[2]
	}

	head, _, _ := strings.Cut(read(t, filepath.Join("..", "nodecache.go")), "\npackage nodecache\n")
	head = strings.Join(strings.Fields(strings.ReplaceAll(head, "\n//", " ")), " ")
	count := 0
	for n := '1'; n <= '9'; n++ {
		_, rest, ok := strings.Cut(head, " "+string(n)+". ")
		if !ok {
			break
		}
		count++
		first, _, _ := strings.Cut(rest, ". ")
		if !hasRow(rows, string(n)+". "+first) {
			t.Errorf("nodecache.go promises %q, and docs/proof.md has no row for it", string(n)+". "+first)
		}
	}
	if count != 8 {
		t.Errorf("nodecache.go has %d promises, of which the page was made for 8", count)
	}
	table, _, _ := strings.Cut(readme(t), "\n## Try it\n")
	for _, m := range regexp.MustCompile(`(?m)^\| ([a-zA-Z].+?) \|`).FindAllStringSubmatch(table, -1) {
		if !hasRow(rows, m[1]) {
			t.Errorf("the README's table has %q, and docs/proof.md no row for it", m[1])
		}
	}

	var tests strings.Builder
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		tests.WriteString(read(t, f))
	}
	for promise, by := range rows {
		names := regexp.MustCompile("`(Test\\w+|make [a-z0-9-]+)[ `]").FindAllStringSubmatch(by, -1)
		if len(names) == 0 && by != "Shown by" && !strings.HasPrefix(promise, "--") {
			t.Errorf("nothing shows %q", promise)
		}
		for _, m := range names {
			target, isTarget := strings.CutPrefix(m[1], "make ")
			if isTarget && !strings.Contains(read(t, filepath.Join("..", "Makefile")), "\n"+target+":") {
				t.Errorf("%q names make %s, which is no target", promise, target)
			}
			if !isTarget && !strings.Contains(tests.String(), "func "+m[1]+"(") {
				t.Errorf("%q names %s, which is no test", promise, m[1])
			}
		}
	}
}

// hasRow tells whether a row begins as the promise does.
func hasRow(rows map[string]string, promise string) bool {
	for r := range rows {
		if strings.HasPrefix(r, strings.TrimSuffix(promise, ".")) || strings.HasPrefix(promise, strings.TrimSuffix(r, ".")) {
			return true
		}
	}
	return false
}
