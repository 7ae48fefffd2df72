package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// An Image is a container image that is made here, since no registry is asked for one.
type Image struct {
	Name   string // as a pod names it, with registry and tag
	Root   string // the directory of its files; all belong to root
	Config ImageConfig
}

// ImageConfig is how an image is started, in the words of OCI's image specification, 1.0.
type ImageConfig struct {
	Entrypoint []string `json:",omitempty"`
	Cmd        []string `json:",omitempty"`
	Env        []string `json:",omitempty"` // NAME=value
}

// object is one of JSON.
type object = map[string]any

const mediaType = "application/vnd.oci.image."

// Archive writes the image in OCI's image layout, as a tar file that containerd imports.
func (i Image) Archive(path string) error {
	err := func() error {
		layer, err := i.layer()
		if err != nil {
			return err
		}
		var archive bytes.Buffer
		w := tar.NewWriter(&archive)
		blob := func(typ string, content []byte) object {
			sum := fmt.Sprintf("%x", sha256.Sum256(content))
			err = errors.Join(err, add(w, "blobs/sha256/"+sum, content))
			return object{"mediaType": mediaType + typ, "digest": "sha256:" + sum, "size": len(content)}
		}
		encode := func(v any) []byte {
			b, failed := json.Marshal(v)
			err = errors.Join(err, failed)
			return b
		}
		files := blob("layer.v1.tar", layer)
		config := blob("config.v1+json", encode(object{
			"architecture": runtime.GOARCH, "os": "linux", "config": i.Config,
			"rootfs": object{"type": "layers", "diff_ids": []any{files["digest"]}},
		}))
		manifest := blob("manifest.v1+json", encode(object{
			"schemaVersion": 2, "mediaType": mediaType + "manifest.v1+json", "config": config, "layers": []any{files},
		}))
		manifest["annotations"] = object{"io.containerd.image.name": i.Name}
		err = errors.Join(err,
			add(w, "index.json", encode(object{"schemaVersion": 2, "manifests": []any{manifest}})),
			add(w, "oci-layout", encode(object{"imageLayoutVersion": "1.0.0"})),
			w.Close())
		if err != nil {
			return err
		}
		return os.WriteFile(path, archive.Bytes(), 0o644)
	}()
	if err != nil {
		return fmt.Errorf("making the image %s of %s: %w", i.Name, i.Root, err)
	}
	return nil
}

func add(w *tar.Writer, name string, content []byte) error {
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

// layer is the image's files as a tar file.
func (i Image) layer() ([]byte, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	err := filepath.WalkDir(i.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == i.Root {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		target := ""
		if d.Type() == fs.ModeSymlink {
			if target, err = os.Readlink(path); err != nil {
				return err
			}
		}
		header, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return err
		}
		if header.Name, err = filepath.Rel(i.Root, path); err != nil {
			return err
		}
		header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", ""
		if err := w.WriteHeader(header); err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	})
	return layer.Bytes(), errors.Join(err, w.Close())
}
