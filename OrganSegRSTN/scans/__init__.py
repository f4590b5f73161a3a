"""Reading and writing scans: DICOM, NIfTI, and where their arrays lie in the patient."""
