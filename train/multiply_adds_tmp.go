package train

// MultiplyAdds are those of one step.
type MultiplyAdds struct {
	Forward        int64 `json:"forward"`
	Backward       int64 `json:"backward"`
	Recomputation  int64 `json:"recomputation"`
	FullFineTuning int64 `json:"full_fine_tuning"`
}

func (s *step) countMultiplyAdds() MultiplyAdds { return MultiplyAdds{} }
