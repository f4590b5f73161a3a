"""Weights from the network: a download that goes on where it stopped, with a progress bar and a checksum."""

from running.files import locked

VGG16 = 'https://download.pytorch.org/models/vgg16-397923af.pth'
VGG16_SHA256 = '397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0'


def fetch_vgg16(folder):
    """Return the path of torchvision's VGG-16 (553 MB) in `folder`, downloaded if it is not there."""
    path = folder / VGG16.rpartition('/')[2]
    if not path.exists():
        fetch(VGG16, path, VGG16_SHA256)
    return path


def fetch(url, path, sha256):
    """Download `url` to `path`; resume an interrupted download from PATH.part.

    ConnectionError: the network failed; ValueError: the file is not the one that `sha256` names, and is removed.
    """
    import pooch

    part = path.with_name(f'{path.name}.part')
    with locked(path.with_name(f'.{path.name}.lock')):
        if not part.exists() or pooch.file_hash(part) != sha256:
            try:
                download(url, part)
            except OSError as error:  # all of requests' errors, too
                raise ConnectionError(
                    f'{url}: not downloaded ({type(error).__name__}); the same command goes on where it stopped, or '
                    f'download it elsewhere, and give --convert FILE'
                ) from error
        if pooch.file_hash(part) != sha256:
            part.unlink()
            raise ValueError(f'{url}: its SHA-256 is not {sha256}: a damaged download, removed; start again')
        part.rename(path)


def download(url, part):
    """Append to the file `part` what it lacks of `url`."""
    import pooch

    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, 'ab') as file:
        headers = {'Accept-Encoding': 'identity'}
        if file.tell():
            headers['Range'] = f'bytes={file.tell()}-'
        pooch.HTTPDownloader(progressbar=True, chunk_size=2**16, headers=headers)(url, file, None)
