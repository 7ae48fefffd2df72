package main

import (
	"errors"
	"math"
)

// fit finds by least squares what memory is made of: memory[i] is the sum of each of
// parts[i] times the coefficient that is returned for it. off is by how much this misses
// at most.
func fit(parts [][]float64, memory []float64) (coefficients []float64, off float64, err error) {
	if len(parts) == 0 {
		return nil, 0, errors.New("fitting the formula: nothing was measured")
	}
	// The normal equations, solved by Gauss's elimination.
	n := len(parts[0])
	a := make([][]float64, n)
	for i := range a {
		a[i] = make([]float64, n+1)
		for k, x := range parts {
			for j := range n {
				a[i][j] += x[i] * x[j]
			}
			a[i][n] += x[i] * memory[k]
		}
	}
	for i := range n {
		for j := i + 1; j < n; j++ {
			if math.Abs(a[j][i]) > math.Abs(a[i][i]) {
				a[i], a[j] = a[j], a[i]
			}
		}
		if math.Abs(a[i][i]) < 1e-9 {
			return nil, 0, errors.New("fitting the formula: too few different measurements")
		}
		for j := range n {
			if j == i {
				continue
			}
			f := a[j][i] / a[i][i]
			for k := i; k <= n; k++ {
				a[j][k] -= f * a[i][k]
			}
		}
	}
	for i := range n {
		coefficients = append(coefficients, a[i][n]/a[i][i])
	}
	for k, x := range parts {
		sum := 0.0
		for i := range n {
			sum += coefficients[i] * x[i]
		}
		off = max(off, math.Abs(sum-memory[k]))
	}
	return coefficients, off, nil
}
