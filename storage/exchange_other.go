//go:build !linux && !darwin

package storage

// Exchange reports false: there is no way here to swap two folders in one step.
func Exchange(string, string) (bool, error) { return false, nil }
