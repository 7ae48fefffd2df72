package nodecachemode

import (
	"errors"
	"fmt"
	"os"
	"sync"
)

// maxCorefile bounds a template, which is a key of a ConfigMap.
const maxCorefile = 1 << 20

// A Source makes the Corefile anew whenever it is asked, of what the files say then.
type Source struct {
	Flags

	mu       sync.Mutex
	settings Settings // the last ones that were right
}

// A Reading is what a Source has made.
type Reading struct {
	Corefile string
	Made     bool     // of the template; else it is the Corefile of -conf, with nodecache added
	Notes    []string // what the template's author should know
	Invalid  error    // what is wrong with the ConfigMap, of which the last right state is used
}

// Read makes the Corefile. An error means that there is none.
//
// Where there is no template the Corefile itself is taken, as by node-cache.
func (s *Source) Read() (r Reading, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	template, err := readFile(s.Template, maxCorefile)
	if errors.Is(err, os.ErrNotExist) {
		text, e := readFile(s.Corefile, maxCorefile)
		if e != nil {
			return r, fmt.Errorf("reading the template of -basecorefile: %w; and the Corefile of -conf: %w", err, e)
		}
		r.Corefile, r.Notes, err = s.adapt(string(text), s.Corefile, Settings{})
		return r, err
	}
	if err != nil {
		return r, fmt.Errorf("reading the template of -basecorefile: %w", err)
	}
	r.Made = true
	settings := s.settings
	if dir := s.configMap(); dir != "" {
		var now Settings
		if now, err = readSettings(dir); err != nil {
			r.Invalid = fmt.Errorf("reading the ConfigMap in %s: %w", dir, err)
		} else {
			settings = now
		}
	}
	made := func(with Settings) error {
		text, err := s.fill(string(template), s.Template, with)
		if err != nil {
			return err
		}
		r.Corefile, r.Notes, err = s.adapt(text, s.Corefile, with)
		return err
	}
	err = made(settings)
	if twice := (duplicateError{}); errors.As(err, &twice) {
		r.Invalid = fmt.Errorf("reading the ConfigMap in %s: %w", s.configMap(), err)
		settings = s.settings
		if err = made(settings); errors.As(err, &twice) { // the template has got the zone since
			settings = Settings{}
			err = made(settings)
		}
	}
	if err == nil {
		s.settings = settings
	}
	return r, err
}

// configMap is the folder of the ConfigMap kube-dns, or "".
func (s *Source) configMap() string {
	if s.ConfigMap != "" {
		return s.ConfigMap
	}
	if _, err := os.Stat(defaultConfigMap); err == nil {
		return defaultConfigMap
	}
	return ""
}
