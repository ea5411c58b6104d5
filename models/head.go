package models

// Head returns the run-time name of the module that is the model's output
// embedding, or "" where it has none or its architecture is not known.
func (m *Model) Head() string {
	if m.data == nil {
		return ""
	}
	return m.data.Head
}

// EncoderDecoder reports whether the config says that the model is an encoder
// with a decoder.
func (c *Config) EncoderDecoder() bool {
	v, ok := c.value("is_encoder_decoder")
	return ok && v.Kind() == 't'
}
