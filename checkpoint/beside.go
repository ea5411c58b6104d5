package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// quantizationFiles are what AutoGPTQ and AutoAWQ said of their weights in, before config.json had a place for it, in
// the order in which GPTQModel looks for them.
var quantizationFiles = []string{"quantize_config.json", "quant_config.json"}

// quantizationBeside takes the quantization_config that is in a file of its own, where config.json has none and there
// are weights of which it may be.
func (c *Checkpoint) quantizationBeside(ctx context.Context) error {
	if c.ConfigJSON == nil || c.Config.Quantization != nil || !slices.ContainsFunc(c.container.Tensors(), packed) {
		return nil
	}
	for _, name := range quantizationFiles {
		b, err := ReadSmall(ctx, c.Dir, name, maxConfigBytes)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		object, method, err := inConfig(b)
		if err != nil {
			return fmt.Errorf("%s: %w: %w", c.Dir.Path(name), formats.ErrMalformed, err)
		}
		if object == nil {
			continue
		}
		joined, err := models.EditConfig(c.ConfigJSON, models.Set(quantizationKey, object))
		if err == nil {
			c.Config, err = models.ParseConfig(joined)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.Dir.Path(name), err)
		}
		c.QuantizationFile = name
		c.Notices = append(c.Notices, fmt.Sprintf("its %s says nothing of quantised weights, they are read as %s has it, as "+
			"those of %s", ConfigName, name, tensor.Quote(method)))
		return nil
	}
	return nil
}

// quantizationKey is the member of config.json that says how weights are quantised.
const quantizationKey = "quantization_config"

// packed reports whether a tensor may be the integers of GPTQ or AWQ.
func packed(t formats.Tensor) bool {
	return t.DType == tensor.I32 && strings.HasSuffix(t.Name, ".qweight")
}

// ownNames are those of AutoAWQ's file for what is called otherwise in a quantization_config.
var ownNames = map[string]string{"w_bit": "bits", "q_group_size": "group_size"}

// inConfig returns the content of such a file as a quantization_config has it, and nil where it is about something
// else. The first releases did not say the method.
func inConfig(file []byte) (object jsontext.Value, method string, err error) {
	var members map[string]jsontext.Value
	if err := json.Unmarshal(file, &members); err != nil {
		return nil, "", errors.New(strings.Join(strings.Fields(err.Error()), " "))
	}
	method = "gptq"
	for _, name := range []string{"w_bit", "q_group_size", "zero_point", "version"} {
		if members[name] != nil {
			method = "awq"
		}
	}
	for _, own := range slices.Sorted(maps.Keys(ownNames)) {
		name, v := ownNames[own], members[own]
		switch {
		case v == nil:
			continue
		case members[name] == nil:
			members[name] = v
		case !bytes.Equal(members[name], v):
			return nil, "", fmt.Errorf("its %s is %s and its %s %s, expected one number", own, tensor.Quote(string(v)), name,
				tensor.Quote(string(members[name])))
		}
		delete(members, own)
	}
	if members["bits"] == nil {
		return nil, "", nil
	}
	if v := members["quant_method"]; v == nil {
		members["quant_method"] = jsontext.Value(`"` + method + `"`)
	} else if json.Unmarshal(v, &method) != nil {
		return nil, "", errors.New("its quant_method is no string")
	}
	object, err = json.Marshal(members, json.Deterministic(true))
	return object, method, err
}
