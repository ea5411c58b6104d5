package pipeline

import "github.com/lorakit/lorakit/formats"

// MetadataRoundTrip writes metadata down in a plan and reads them back.
func MetadataRoundTrip(m formats.Metadata) (formats.Metadata, error) {
	return (&Plan{Metadata: metadata(m)}).metadata()
}
