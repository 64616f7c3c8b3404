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

{{/* A release is one service, so its name tells them apart. Names of objects have no underscores. */}}
{{- define "switchgear.name" -}}
{{ printf "switchgear-%s" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}
