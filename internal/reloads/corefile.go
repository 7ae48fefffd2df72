package reloads

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
)

// load reads the Corefile as CoreDNS does.
func load() (caddy.Input, error) { return caddy.LoadCaddyfile("dns") }

// hashOf returns the hash of a Corefile, imports and variables resolved, by which the reload
// plugin knows it (coredns_reload_version_info). It is "" where the file can't be read.
func hashOf(in caddy.Input) string {
	if in == nil {
		return ""
	}
	blocks, err := caddyfile.Parse(in.Path(), bytes.NewReader(in.Body()), nil)
	if err != nil {
		return ""
	}
	text, err := json.Marshal(blocks)
	if err != nil {
		return ""
	}
	sum := sha512.Sum512(text)
	return hex.EncodeToString(sum[:])
}

// show says which Corefile is in force.
func show(hash string) {
	inForce.Reset()
	inForce.WithLabelValues("sha512", hash).Set(1)
}
