"""A caption in a file of its own beside the picture: `photo.txt`, or `photo.jpg.xmp`.

Text takes the place of the picture's ending, as trainers read it; XMP is appended to the whole
name, as photo managers (darktable, digiKam, Immich) read it. Each appears whole or not at all.
"""

import contextlib
import os
import re
from importlib.metadata import version
from pathlib import Path
from xml.sax.saxutils import escape

from .errors import OptionError, OutputError

__all__ = ["Sidecars", "xmp_packet"]

_FORMS = ("txt", "xmp")
_TOOL = "fastvlm-mlx"
# Everything but the characters that XML 1.0 allows (section 2.2, Char).
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Sidecars:
    """Writes sidecars of one form, "txt" or "xmp". Raises OptionError for any other.

    An existing file is replaced only with `force`, or if it is an XMP packet that this library
    wrote; one that says the same already is left alone.
    """

    def __init__(self, form: str, *, force: bool = False) -> None:
        if form not in _FORMS:
            raise OptionError(f"sidecar is {form!r}; expected txt or xmp.")
        self._form, self._force = form, force
        self._written: dict[tuple[int, int], str] = {}

    def path(self, picture: str) -> Path:
        """Where the caption of a picture goes."""
        path = Path(os.path.expanduser(picture))  # noqa: PTH111
        return path.with_suffix(".txt") if self._form == "txt" else Path(f"{path}.xmp")

    def write(self, picture: str, text: str) -> None:
        """Write the caption of a picture beside it. Raises OutputError; nothing is half written."""
        path = self.path(picture)
        content = (xmp_packet(text) if self._form == "xmp" else text + "\n").encode()
        partial = path.with_name(f".{path.name}.partial")
        try:
            exists = path.exists()
            # The file system says which sidecars are one: capitals may make no difference there.
            owner = self._written.get(_identity(path), picture) if exists else picture
            if owner != picture:
                raise OutputError(f"{path} belongs to {owner}, whose name differs in its ending.")
            if not self._force and exists:
                existing = path.read_bytes()
                if existing == content:
                    self._written[_identity(path)] = picture
                    return
                if self._form == "txt" or f'x:xmptk="{_TOOL}'.encode() not in existing:
                    raise OutputError(f"{path} exists; --force replaces it.")
            partial.write_bytes(content)
            partial.replace(path)
            self._written[_identity(path)] = picture
        except OSError as error:
            # Nothing can be removed either where nothing can be written.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OutputError(
                f"{path} cannot be written ({error.strerror or error}); the caption is not lost "
                "if --out keeps it"
            ) from error


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def xmp_packet(text: str) -> str:
    """An XMP packet whose dc:description is `text` (ISO 16684-1)."""
    described = escape(_NOT_XML.sub("\ufffd", text))
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="{_TOOL} {version("fastvlm-mlx")}">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
   <dc:description>
    <rdf:Alt>
     <rdf:li xml:lang="x-default">{described}</rdf:li>
    </rdf:Alt>
   </dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""
