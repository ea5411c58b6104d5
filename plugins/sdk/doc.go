// Package sdk makes a program a plugin of lorakit: formats and quantisation schemes in a process of their own.
//
// A Format opens files and lists their tensors; lorakit reads the data by itself wherever it lies in the file as it is.
// To be written too it says where each byte goes (Layouter), or writes the file itself (Streamer). A Scheme finds the
// weights that several tensors make up, and decodes them tile by tile. A program has any number of both:
//
//	func main() { sdk.Serve(sdk.Plugin{Name: "raw", Version: "1.0.0", Formats: []sdk.Format{format{}}}) }
//
// Standard output belongs to the handshake with lorakit: while a program runs as a plugin, what it prints there goes to
// standard error, whose last lines lorakit shows when something fails. The program ends when lorakit does.
//
// Errors of formats and quant have kinds (formats.ErrMalformed, formats.ErrUnsupported, formats.ErrLimit,
// fs.ErrNotExist, quant.ErrMalformed, …), which arrive as what they are; any other is a failure of the plugin.
package sdk
