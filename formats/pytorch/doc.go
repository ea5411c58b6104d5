// Package pytorch reads and lays out the files that torch.save writes
// (https://docs.pytorch.org/docs/stable/notes/serialization.html), named .bin, .pt, .pth or .ckpt: one file, or a
// folder of shards with an index.
//
// Since PyTorch 1.6 a file is a zip archive whose entries are stored as they are:
//
//	NAME/data.pkl            a pickle: the state dict, each tensor as storage, offset, size and stride
//	NAME/.format_version     1
//	NAME/.storage_alignment  64: data begins at multiples of it
//	NAME/byteorder           "little" or "big"
//	NAME/data/KEY            the bytes of a storage
//	NAME/version             3
//
// [Format.Layout] makes such files, to the byte those of torch.save: torch.load takes them, with
// weights_only=True and mmap=True too.
//
// Before, it was five pickles (a magic number, the protocol's version, facts of the machine, the state dict, the keys
// of the storages), then for each storage the number of its elements in 8 bytes and the elements.
//
// # The pickle
//
// A pickle is a program: what it names it may call. It is read by a machine of our own, which knows the globals that a
// state dict needs and makes what they stand for itself: OrderedDict, torch.Size, the storage classes, dtypes, and the
// functions that rebuild a tensor or a parameter. All else is refused with [ErrUnsafe], by name, where it is first
// mentioned; nothing is ever run. This is what torch.load takes with weights_only=True, less what has no plain bytes:
// quantised, sparse, nested and meta tensors and tensors with a conjugate or negative bit are refused with
// [ErrUnsupported].
//
// # The state dict
//
// The tensors are those of the dict that the pickle holds. If that is a training checkpoint, a dict with the state
// dict under "state_dict", "model_state_dict", "model", "module" or "params", they are the tensors of that one,
// without a prefix. Two dicts of tensors beside each other, or a dict of tensors under any other name, are an error
// that lists the names, since it is not known which is meant.
//
// Strings, numbers and booleans beside the tensors are in Metadata, numbers and booleans as Python writes them, with
// "format": "pt" as transformers expects it. Other values, such as an optimizer's state, are left out;
// "pytorch.ignored" in Metadata lists their names. Within the state dict itself only values without a tensor in them
// are left out: a list of tensors there is an error.
//
// # Tensors
//
// A tensor that is contiguous is a range of the file's bytes. Another one, such as a transposed or expanded view, is
// gathered in row-major order as it is read. Tensors may share a storage, as tied weights do; each is listed.
// float4_e2m1fn_x2 holds two elements in a byte, so its last dimension is twice PyTorch's.
//
// A file from a big-endian machine is refused with [ErrUnsupported], and so are zip entries that are compressed or
// encrypted. Checksums are written and not looked at: PyTorch itself does not, and can write files without them.
package pytorch
