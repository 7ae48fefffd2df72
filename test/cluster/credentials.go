package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// users are who asks the API server: name, and group.
var users = map[string][2]string{
	"admin":                   {"admin", "system:masters"},
	"kubelet":                 {"system:node:" + nodeName, "system:nodes"},
	"kube-controller-manager": {"system:kube-controller-manager", ""},
	"kube-scheduler":          {"system:kube-scheduler", ""},
	"kube-proxy":              {"system:kube-proxy", ""},
}

// writeCredentials writes into a directory what the API server proves itself with (ca.crt,
// server.crt, server.key), what it signs service accounts' tokens with (accounts.key,
// accounts.pub), its users' tokens (tokens.csv), and for each of them NAME.kubeconfig.
func writeCredentials(dir string, s setup) error {
	ca := &x509.Certificate{
		Subject: pkix.Name{CommonName: "cluster"}, SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	caKey, err := writeCertificate(dir, "ca", ca, ca, nil)
	if err != nil {
		return err
	}
	server := &x509.Certificate{
		Subject: pkix.Name{CommonName: "kube-apiserver"}, SerialNumber: big.NewInt(2),
		DNSNames:    []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, f := range s.families {
		server.IPAddresses = append(server.IPAddresses, net.ParseIP(f.Node), net.ParseIP(f.API))
	}
	if _, err := writeCertificate(dir, "server", server, ca, caKey); err != nil {
		return err
	}
	accounts, err := newKey(dir, "accounts")
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(accounts.Public())
	if err != nil {
		return err
	}
	if err := writePEM(dir, "accounts.pub", "PUBLIC KEY", public); err != nil {
		return err
	}

	var tokens strings.Builder
	for name, user := range users {
		random := make([]byte, 16)
		if _, err := rand.Read(random); err != nil {
			return err
		}
		token := hex.EncodeToString(random)
		fmt.Fprintf(&tokens, "%s,%s,%s", token, user[0], user[0])
		if user[1] != "" {
			fmt.Fprintf(&tokens, ",%q", user[1])
		}
		fmt.Fprintln(&tokens)
		config := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: cluster, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: user, user: {token: %s}}]
contexts: [{name: context, context: {cluster: cluster, user: user}}]
current-context: context
`, s.apiURL(), filepath.Join(dir, "ca.crt"), token)
		if err := os.WriteFile(filepath.Join(dir, name+".kubeconfig"), []byte(config), 0o600); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "tokens.csv"), []byte(tokens.String()), 0o600)
}

// writeCertificate makes a key and a certificate for it that parent has signed, or with no
// key of parent the key itself.
func writeCertificate(dir, name string, cert, parent *x509.Certificate, by *ecdsa.PrivateKey) (*ecdsa.PrivateKey, error) {
	key, err := newKey(dir, name)
	if err != nil {
		return nil, err
	}
	if by == nil {
		by = key
	}
	cert.NotBefore = time.Now().Add(-time.Hour)
	cert.NotAfter = time.Now().Add(24 * time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, key.Public(), by)
	if err != nil {
		return nil, err
	}
	return key, writePEM(dir, name+".crt", "CERTIFICATE", der)
}

func newKey(dir, name string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writePEM(dir, name+".key", "EC PRIVATE KEY", der)
}

func writePEM(dir, name, typ string, der []byte) error {
	return os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600)
}
