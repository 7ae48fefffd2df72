{{- define "nodecache.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "nodecache.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "nodecache.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "nodecache.labels" -}}
app.kubernetes.io/name: {{ include "nodecache.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* Which image: without iptables where it is not needed. */ -}}
{{- define "nodecache.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ if or .Values.cilium.enabled (eq .Values.config.firewall "nftables") }}-nftables{{ end }}
{{- end -}}
{{- end -}}

{{- /* The values of an address or a list of them, as JSON. */ -}}
{{- define "nodecache.list" -}}
{{- if kindIs "string" . -}}
{{- if . -}}{{ list . | toJson }}{{- else -}}[]{{- end -}}
{{- else -}}
{{ . | toJson }}
{{- end -}}
{{- end -}}

{{- define "nodecache.bind" -}}
{{- if .Values.cilium.enabled -}}
eth0
{{- else -}}
{{- $local := include "nodecache.list" .Values.config.localDns | fromJsonArray -}}
{{- $service := include "nodecache.list" .Values.config.dnsServer | fromJsonArray -}}
{{- if not .Values.config.bindServiceIp -}}
{{- $service = list -}}
{{- else if not $service -}}
{{- $service = list "{$KUBE_DNS_SERVICE_HOST}" -}}
{{- end -}}
{{- $all := concat (list (first $local)) $service (rest $local) -}}
{{- if .Values.config.dualStack -}}
{{- $all = append $all "{$KUBE_DNS_IPV6_SERVICE_HOST}" -}}
{{- end -}}
{{- join " " $all -}}
{{- end -}}
{{- end -}}

{{- /* The address that probes ask. */ -}}
{{- define "nodecache.probed" -}}
{{- include "nodecache.list" .Values.config.localDns | fromJsonArray | first -}}
{{- end -}}

{{- /* The keys of the ConfigMap that the Corefile imports from custom, as JSON. */ -}}
{{- define "nodecache.custom" -}}
{{- $keys := list "none.override" "none.server" -}}
{{- if .Values.config.extraOverrides -}}
{{- $keys = append $keys "values.override" -}}
{{- end -}}
{{- if or .Values.config.extraClusterDomains .Values.config.extraServerBlocks -}}
{{- $keys = append $keys "values.server" -}}
{{- end -}}
{{- toJson $keys -}}
{{- end -}}

{{- /* An IPv6 address with a port is in brackets. */ -}}
{{- define "nodecache.bracketed" -}}
{{- if contains ":" . -}}[{{ . }}]{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{- /* The variable that Kubernetes makes of a Service's name. */ -}}
{{- define "nodecache.variable" -}}
{{- . | upper | replace "-" "_" -}}_SERVICE_HOST
{{- end -}}

{{- define "nodecache.goMemLimit" -}}
{{- if .Values.goMemLimit -}}
{{- .Values.goMemLimit -}}
{{- else -}}
{{- $limit := dig "limits" "memory" "" .Values.resources | toString -}}
{{- if regexMatch "^[0-9]+Mi$" $limit -}}
{{- printf "%dMiB" (max 16 (sub (trimSuffix "Mi" $limit | atoi) 48)) -}}
{{- else if regexMatch "^[0-9]+Gi$" $limit -}}
{{- printf "%dMiB" (sub (mul (trimSuffix "Gi" $limit | atoi) 1024) 48) -}}
{{- else if $limit -}}
{{- fail (printf "goMemLimit has to be given for the memory limit %s, which is neither Mi nor Gi: somewhat less than it, such as 144MiB for 192Mi" $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* What the schema can't see. */ -}}
{{- define "nodecache.check" -}}
{{- with .Values.config -}}
{{- if and .forwardToClusterDns .upstreamServers -}}
{{- fail "config.forwardToClusterDns has all names asked of the cluster's DNS, and config.upstreamServers of others: give one of the two" -}}
{{- end -}}
{{- if and .enableLogging .fastpath.enabled (not .fastpath.auto) -}}
{{- fail "config.enableLogging can't go with config.fastpath.enabled, which answers past the plugin log, where config.fastpath.auto is false" -}}
{{- end -}}
{{- if and .dualStack (not .bindServiceIp) -}}
{{- fail "config.dualStack serves the address of a Service, and config.bindServiceIp is false: leave one of the two, and name addresses of both families in config.localDns" -}}
{{- end -}}
{{- end -}}
{{- end -}}
