{{- define "switchgear.labels" -}}
{{ include "switchgear.selector" . }}
app.kubernetes.io/version: {{ .Values.image.tag | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "switchgear.selector" -}}
app.kubernetes.io/name: {{ required "component is not set: use -f values/<service>.yaml" .Values.component }}
app.kubernetes.io/part-of: switchgear
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* What the certificate of the service says it is: certificate_name in libs/common/identity.py. */}}
{{- define "switchgear.certificate" -}}
{{ .Values.component | hasSuffix "_worker" | ternary "worker" (.Values.component | replace "_" "-") }}.switchgear
{{- end }}

{{/* How Kubernetes asks for health: by itself, or, since it knows no TLS, by a program in the container.
     Given: the root context, and whose health. */}}
{{- define "switchgear.probe" -}}
{{- $root := index . 0 }}{{- $service := index . 1 }}
{{- $port := $root.Values.ports.grpc }}
{{- if $root.Values.tls.secretName }}
{{- $folder := "/etc/switchgear/tls" }}
exec:
  command: [python, -m, deploy.local.probe, grpc, "127.0.0.1:{{ $port }}", --service, {{ $service | quote }},
            --tls, {{ $folder }}/ca.crt, {{ $folder }}/tls.crt, {{ $folder }}/tls.key, {{ include "switchgear.certificate" $root }}]
{{- else if $service }}
grpc: {port: {{ $port }}, service: {{ $service }}}
{{- else }}
grpc: {port: {{ $port }}}
{{- end }}
{{- end }}

{{/* A release is one service, so its name tells them apart. Names of objects have no underscores. */}}
{{- define "switchgear.name" -}}
{{ printf "switchgear-%s" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}
