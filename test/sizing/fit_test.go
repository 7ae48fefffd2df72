package main

import (
	"math"
	"testing"
)

func TestFit(t *testing.T) {
	want := []float64{30, 1.5, .002}
	var parts [][]float64
	var memory []float64
	for _, blocks := range []float64{2, 8} {
		for _, entries := range []float64{0, 20, 80} {
			parts = append(parts, []float64{1, blocks, entries})
			memory = append(memory, want[0]+want[1]*blocks+want[2]*entries)
		}
	}
	got, off, err := fit(parts, memory)
	if err != nil || off > 1e-6 {
		t.Fatalf("%v, off by %v, %v", got, off, err)
	}
	for i := range want {
		if math.Abs(got[i]-want[i]) > 1e-6 {
			t.Errorf("coefficient %d is %v, want %v", i, got[i], want[i])
		}
	}
	// What is measured badly shows itself.
	memory[0] += 3
	if _, off, err := fit(parts, memory); err != nil || off < 1 {
		t.Errorf("off by %v, %v", off, err)
	}
	if _, _, err := fit(parts[:2], memory[:2]); err == nil {
		t.Error("two measurements are enough for three unknowns")
	}
}
