package ruleset

import "testing"

// The texts are kube-proxy's.
func TestServiceNames(t *testing.T) {
	for comment, want := range map[string]string{
		"kube-system/kube-dns:dns-tcp cluster IP":  "kube-system/kube-dns",
		"default/kubernetes cluster IP":            "default/kubernetes", // a port without a name
		"kube-system/kube-dns:dns loadbalancer IP": "",
		"kubernetes service portals":               "",
		" cluster IP":                              "",
	} {
		if got := serviceOfComment(comment); got != want {
			t.Errorf("the comment %q: %q, want %q", comment, got, want)
		}
	}
	for chain, want := range map[string]string{
		"service-NWBZK7IH-kube-system/kube-dns/udp/dns":  "kube-system/kube-dns",
		"local-NWBZK7IH-a-b/c-d/tcp/":                    "a-b/c-d",
		"external-NWBZK7IH-kube-system/kube-dns/udp/dns": "",
		"service-NWBZK7IH":                               "",
		"":                                               "",
	} {
		if got := serviceOfChain(chain); got != want {
			t.Errorf("the chain %q: %q, want %q", chain, got, want)
		}
	}
}
