package nodecachemode

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/coredns/caddy/caddyfile"
)

// A token is a word of a Corefile, and where it stands in the text, its quotes included.
type token struct {
	text       string
	start, end int
	first      bool // on its line
	quoted     bool
}

// scan splits a Corefile as caddy's lexer does: words between blanks, quotes in which only a quote
// is escaped, comments from a # to the end of the line.
func scan(text string) (tokens []token) {
	fresh := true // no token on this line yet
	for i := 0; i < len(text); {
		c := rune(text[i])
		switch {
		case c == '\n':
			fresh = true
			i++
			continue
		case unicode.IsSpace(c):
			i++
			continue
		case c == '#':
			for i < len(text) && text[i] != '\n' {
				i++
			}
			continue
		}
		t := token{start: i, first: fresh, quoted: c == '"'}
		var word strings.Builder
		if t.quoted {
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' && i+1 < len(text) && text[i+1] == '"' {
					i++
				}
				word.WriteByte(text[i])
			}
			i = min(i+1, len(text))
		} else {
			// A comment that begins inside a word ends at the next blank.
			for comment := false; i < len(text) && !unicode.IsSpace(rune(text[i])); i++ {
				if comment = comment || text[i] == '#'; !comment {
					word.WriteByte(text[i])
				}
			}
		}
		t.text, t.end = word.String(), i
		tokens, fresh = append(tokens, t), false
	}
	return tokens
}

// A part is a server block or a snippet: the tokens of its keys, and the place after its brace.
type part struct {
	keys  []token
	body  []token // between the braces
	after int     // the offset after the opening brace, or after the keys where there is none
}

// unserved says whether caddy makes no server block of it: of a snippet, and of what has no keys.
func (p part) unserved() bool {
	return len(p.keys) == 0 || len(p.keys) == 1 && strings.HasPrefix(p.keys[0].text, "(") && strings.HasSuffix(p.keys[0].text, ")")
}

// is says whether a block that caddy has read is this one, as far as its keys show.
func (p part) is(b caddyfile.ServerBlock) bool {
	return slices.EqualFunc(p.keys, b.Keys, func(t token, key string) bool {
		return strings.TrimSuffix(t.text, ",") == key || strings.Contains(t.text, "{") // a variable
	})
}

// parts splits a Corefile without imports at the top into its blocks.
func parts(text string) (all []part) {
	tokens := scan(text)
	for i := 0; i < len(tokens); {
		var p part
		comma := false
		for ; i < len(tokens) && tokens[i].text != "{" && (len(p.keys) == 0 || comma || !tokens[i].first); i++ {
			p.keys = append(p.keys, tokens[i])
			p.after = tokens[i].end
			comma = strings.HasSuffix(tokens[i].text, ",")
		}
		if i == len(tokens) || tokens[i].text != "{" { // one block without braces
			p.body = tokens[i:]
			return append(all, p)
		}
		p.after = tokens[i].end
		depth, begin := 0, i+1
		for ; i < len(tokens); i++ {
			if tokens[i].text == "{" {
				depth++
			} else if tokens[i].text == "}" {
				if depth--; depth == 0 {
					break
				}
			}
		}
		p.body = tokens[min(begin, len(tokens)):min(i, len(tokens))]
		all = append(all, p)
		i++
	}
	return all
}

// maxImports bounds how many files are put in the place of imports.
const maxImports = 1000

// inline puts files in the place of the imports that stand outside of blocks, such as
// `import custom/*.server`: only a block that stands in the text can be given a directive. path is
// where the text is from, since imports are relative to it.
func inline(text, path string, left *int) (string, error) {
	snippets := map[string]bool{}
	var out strings.Builder
	done, depth, block := 0, 0, false // block: a line of keys without a brace has been seen
	tokens := scan(text)
	for i, t := range tokens {
		switch {
		case t.text == "{":
			depth++
		case t.text == "}":
			depth--
		case depth == 0 && t.first && t.text != "import" && !block:
			// Keys. What follows on further lines without a brace is the one block's inside.
			j := i
			for j+1 < len(tokens) && (!tokens[j+1].first || strings.HasSuffix(tokens[j].text, ",")) && tokens[j+1].text != "{" {
				j++
			}
			block = j+1 < len(tokens) && tokens[j+1].text != "{"
			if strings.HasPrefix(t.text, "(") {
				snippets[strings.Trim(t.text, "()")] = true
			}
		case depth == 0 && t.first && t.text == "import" && !block && i+1 < len(tokens) && !tokens[i+1].first && !snippets[tokens[i+1].text]:
			arg := tokens[i+1]
			inner, err := imported(arg.text, path, left)
			if err != nil {
				return "", err
			}
			out.WriteString(text[done:t.start])
			fmt.Fprintf(&out, "# import %s\n%s", text[arg.start:arg.end], inner)
			done = arg.end
		}
	}
	out.WriteString(text[done:])
	return out.String(), nil
}

// imported is what an import's files say, their own imports carried out too.
func imported(pattern, from string, left *int) (string, error) {
	if strings.Contains(pattern, "{$") || strings.Contains(pattern, "{%") {
		return "", fmt.Errorf("reading %s: import %s: an environment variable names the file; write its path", from, pattern)
	}
	if !filepath.IsAbs(pattern) {
		pattern = filepath.Join(filepath.Dir(from), pattern)
	}
	files, err := filepath.Glob(pattern)
	if err != nil {
		return "", fmt.Errorf("reading %s: import %s: %w", from, pattern, err)
	}
	if len(files) == 0 && !strings.ContainsAny(pattern, "*?[]") {
		return "", fmt.Errorf("reading %s: import %s: %w", from, pattern, os.ErrNotExist)
	}
	var all strings.Builder
	for _, file := range files {
		if *left--; *left < 0 {
			return "", fmt.Errorf("reading %s: import %s: more than %d files; a file may import itself", from, pattern, maxImports)
		}
		text, err := readFile(file, maxCorefile)
		if err != nil {
			return "", fmt.Errorf("reading %s: import %s: %w", from, pattern, err)
		}
		if all.Len() > maxCorefile {
			return "", fmt.Errorf("reading %s: import %s: more than %d bytes altogether", from, pattern, maxCorefile)
		}
		inner, err := inline(string(text), file, left)
		if err != nil {
			return "", err
		}
		all.WriteString(strings.TrimSuffix(inner, "\n") + "\n")
	}
	return all.String(), nil
}
