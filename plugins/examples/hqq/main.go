// Command hqq is a plugin of lorakit: it stores weights as hqq does, in 4 bits, with a scale and a zero for each group
// of consecutive elements (axis 1), in the form that HQQLinear.state_dict and transformers save in safetensors.
//
// Every such weight is read, to the bit as hqq dequantises it. What is written is rounded to nearest: what hqq makes
// with optimize=False. hqq's own search for better scales and zeros, the half-quadratic of its name, is not done, so
// the result is less exact than hqq's.
//
// Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), and the package hqq
// 0.2.8.
package main

import "github.com/lorakit/lorakit/plugins/sdk"

func main() {
	sdk.Serve(sdk.Plugin{Name: "hqq", Version: "1.0.0", Schemes: []sdk.Scheme{scheme{}}, Deterministic: true})
}
